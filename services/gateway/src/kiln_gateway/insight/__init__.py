"""What one sees of the gateway while it works: requests under way, and the feed of the dashboard."""
