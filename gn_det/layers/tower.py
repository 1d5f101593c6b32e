"""Sequential towers of dense heads whose modules moved up when norms came between them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["GNTower", "insert_norm"]


class GNTower(nn.Sequential):
    """nn.Sequential that gained norms, and also loads weights from before it did.

    The convolutions of a RetinaNet tower are modules 0, 2, 4, 6; with norms they are 0, 3, 6, 9, as
    in Detectron2's own towers with RETINANET.NORM.
    """

    def remap(self, state_dict: dict[str, Tensor], prefix: str) -> list[str]:
        """Rename, in place, the keys of a tower without norms to those of this one.

        Args:
            state_dict: of the whole model; left alone where it holds a tower with norms, or none.
            prefix: of this tower's keys, with the dot at the end.

        Returns:
            Keys that such a tower has and state_dict lacks.
        """
        moved, norms = {}, set()
        for index, module in enumerate(self):
            if isinstance(module, nn.GroupNorm):
                norms.add(index)
            else:
                moved[index - len(norms)] = index
        moved = {
            old: new for old, new in moved.items() if any(True for _ in self[new].parameters())
        }
        only_without_norms = moved.keys() - norms - set(moved.values())
        if not any(f"{prefix}{index}.weight" in state_dict for index in only_without_norms):
            return []
        lost = []
        for old in sorted(moved, reverse=True):
            for name, _ in self[moved[old]].named_parameters():
                key = f"{prefix}{old}.{name}"
                if key in state_dict:
                    state_dict[f"{prefix}{moved[old]}.{name}"] = state_dict.pop(key)
                else:
                    lost.append(key)
        return lost

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, *lists: Any
    ) -> None:
        lost = self.remap(state_dict, prefix)
        if lost:
            *_, error_msgs = lists
            # Detectron2's checkpointer drops those whose index is now that of a norm.
            error_msgs.append(
                f"the weights are of a tower without norms and lack {', '.join(lost)}; load them "
                "with gn_det.checkpoint.Checkpointer, or before inject"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)


def insert_norm(tower: nn.Sequential, conv: nn.Module, norm: nn.Module) -> None:
    """Insert a norm behind a convolution of a Sequential, in place."""
    if type(tower) is nn.Sequential:
        tower.__class__ = GNTower
    tower.insert(list(tower).index(conv) + 1, norm)
