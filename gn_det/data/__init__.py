"""COCO-format data: the generated shapes set, and checking and registering folders."""
