"""Which configs have the same network: what one of them shows holds for the others, too."""

import hashlib
import json
from typing import Any

from mmengine.config import Config

# Keys of a model's config that do not change which layers it has; losses are others.
NOT_LAYERS = {
    'num_classes',
    'init_cfg',
    'pretrained',
    'pretrained2d',
    'train_cfg',
    'test_cfg',
    'data_preprocessor',
    'frozen_stages',
    'norm_eval',
    'with_cp',
    'requires_grad',
    'momentum',
    'mode',
    'sync',
    'zero_init_residual',
    '_scope_',
}


def network_of(cfg: Config) -> str:
    """A name for the network of a config: the same for configs with the same layers."""
    network = dict(scope=cfg.get('default_scope'), model=_layers(cfg.model.to_dict()))
    text = json.dumps(network, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _layers(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _layers(item)
            for key, item in value.items()
            if key not in NOT_LAYERS and not str(key).startswith('loss')
        }
    return [_layers(item) for item in value] if isinstance(value, (list, tuple)) else value
