"""A data set of two pictures in COCO's form, to be spoilt."""

from __future__ import annotations

HEIGHT, WIDTH = 60, 80
SQUARE = [10, 10, 40, 10, 40, 40, 10, 40]


def dataset() -> dict:
    """Four squares, two in each picture, of two categories."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)
        ],
        "categories": [{"id": 1, "name": "box"}, {"id": 2, "name": "disc"}],
        "annotations": [
            {
                "id": i,
                "image_id": 1 + i % 2,
                "category_id": 1 + i // 3,
                "bbox": [10, 10, 30, 30],
                "area": 900,
                "iscrowd": 0,
                "segmentation": [list(SQUARE)],
            }
            for i in (1, 2, 3, 4)
        ],
    }
