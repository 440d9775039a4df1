"""wsbcn_mm.openmmlab.patches: what is changed in the hosts, and how."""

import pytest

pytest.importorskip('mmcv', reason='two of the functions are its own')

import wsbcn_mm  # noqa: F401  changes them
from wsbcn_mm.openmmlab import patches


def test_all_that_is_changed_is_named():
    """A new one is added on purpose: users meet these functions in their traces."""
    assert set(patches.originals) == {
        'mmcv.cnn.utils.fuse_conv_bn._fuse_conv_bn',
        'mmengine.config.config.Config._get_cfg_path',
        'mmengine.config.config.get_installed_path',
        'mmengine.config.config.is_installed',
        'mmengine.dataset.base_dataset.BaseDataset._serialize_data',
        'mmengine.dataset.base_dataset.Compose.__call__',
        'mmengine.model.base_module.BaseModule.init_weights',
        'mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint',
    }


class Host:
    def method(self, x):
        return type(self), x

    @classmethod
    def of_class(cls, x):
        return cls, x

    @staticmethod
    def static(x):
        return x


class Derived(Host):
    pass


def doubled(original, *arguments):
    return original(*arguments[:-1], 2 * arguments[-1])


@pytest.mark.parametrize(
    'name, call, result',
    [
        ('method', lambda: Derived().method(1), (Derived, 2)),
        ('of_class', lambda: Derived.of_class(1), (Derived, 2)),
        ('static', lambda: Derived.static(1), 2),
    ],
)
def test_every_kind_of_method_once_and_back(name, call, result, monkeypatch):
    monkeypatch.setattr(patches, 'originals', {})
    before = vars(Host)[name]
    for _ in range(2):
        patches.surround(Host, name, doubled)
        assert call() == result
    ((place, original),) = patches.originals.items()
    assert place == f'{__name__}.Host.{name}' and original is before
    setattr(Host, name, original)
    assert call() == ((Derived, 1) if isinstance(result, tuple) else 1)
