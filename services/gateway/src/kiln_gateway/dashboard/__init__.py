"""The dashboard's page and assets, built from services/gateway/dashboard by scripts/build_dashboard.sh."""
