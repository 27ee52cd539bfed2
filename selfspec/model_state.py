"""The state of a model: what it is made of by now, so that a change of it is seen."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # `training` among them: views are always in evaluation mode


def state_of(model: PreTrainedModel) -> tuple[object, ...]:
    """Changes whenever the views would no longer compute what the model does: tensors replaced, moved or cast; a
    module's own settings changed, as adapters do when they are switched, merged or disabled."""
    tensors = (*model.parameters(), *model.buffers())
    return (
        *((id(t), t.data_ptr(), t.device, t.dtype) for t in tensors),
        *((id(module), *_settings(module)) for module in model.modules()),
    )


def _settings(module: nn.Module) -> list[tuple[str, str]]:
    own = vars(module).items()
    return [(name, repr(value)) for name, value in own if name not in _OF_EVERY_MODULE and _is_plain(value)]


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
