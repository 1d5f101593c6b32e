"""Detectron2's own modules that end in FusedGroupNorm."""
