"""Numbers of rows that steps come in."""


def decode_ladder(max_rows: int) -> list[int]:
    """Batch sizes worth a graph of their own: few enough to capture, dense enough to waste little."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, *range(160, max_rows, 32)]
    return [*(size for size in sizes if size < max_rows), max_rows]
