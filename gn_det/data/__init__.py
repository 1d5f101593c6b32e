"""Detection data in COCO format: checking, registering, loading, proposals; generated shapes."""
