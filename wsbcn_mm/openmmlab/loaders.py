"""The datasets of a config's loaders: the one walk over what they wrap."""

from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

from wsbcn_mm.openmmlab.config import type_name

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def inner_datasets(dataset: object) -> list[dict]:
    """The datasets below the wrappers (repeated, mixed, concatenated) that read files.

    Args:
        dataset: The config of a dataset. What was built already, or is none, counts as nothing.

    Returns:
        The dicts of the config themselves: what is set in them is set in the config.
    """
    if isinstance(dataset, (list, tuple)):
        return [inner for part in dataset for inner in inner_datasets(part)]
    if not isinstance(dataset, dict):
        return []
    if 'datasets' in dataset:
        return inner_datasets(dataset['datasets'])
    return inner_datasets(dataset['dataset']) if 'dataset' in dataset else [dataset]


def datasets_of(cfg: Config, *loaders: str) -> list[tuple[str, dict]]:
    """The inner datasets of these loaders, each with the loader's name.

    Args:
        cfg: The config.
        *loaders: Names such as ``'train_dataloader'``; one that the config lacks has none.
    """
    return [
        (loader, dataset)
        for loader in loaders
        for dataset in inner_datasets(dataset_of(cfg, loader))
    ]


def dataset_of(cfg: Config, loader: str) -> Any:
    """What a loader of a config has for a dataset; None without a loader.

    Raises:
        ValueError: the loader is a list of loaders.
    """
    part = cfg.get(loader) or {}
    if isinstance(part, (list, tuple)):
        raise ValueError(
            f'{loader} is a list, and mmengine runs one loader\n  several data sets: dataset='
            "dict(type='ConcatDataset', datasets=[...]), whose metrics MMDetection's "
            'MultiDatasetsEvaluator keeps apart'
        )
    return part.get('dataset')


def datasets_of_test(cfg: Config) -> list[dict]:
    """The inner datasets that the config tests on; without a test loader those of validation.

    Raises:
        ValueError: the config has neither, or none with a pipeline; or one that makes several
            versions of an image.
    """
    for loader in ('test_dataloader', 'val_dataloader'):
        found = [
            dataset
            for _, dataset in datasets_of(cfg, loader)
            if dataset.get('pipeline') is not None
        ]
        if found:
            if versions := [d for d in found if makes_versions(d)]:
                raise ValueError(several_versions(loader, versions[0]))
            return found
    raise ValueError(
        f'{cfg.filename or "the config"} has no test_dataloader and no val_dataloader whose '
        'dataset has a pipeline\n  what images are and how they are read is taken from there'
    )


def makes_versions(dataset: dict) -> bool:
    """Whether the pipeline of a dataset is that of test-time augmentation."""
    return any(type_name(step) == 'TestTimeAug' for step in dataset.get('pipeline') or ())


def several_versions(loader: str, dataset: dict) -> str:
    """A model as it was trained is given several versions of an image."""
    return (
        f'{loader}: the pipeline of {type_name(dataset)} makes several versions of each image '
        '(TestTimeAug), and the model takes one\n  call that pipeline tta_pipeline, for '
        'tools/test.py --tta, and give the data set one that ends in one image'
    )


def prefixes_of(dataset: dict) -> dict[str, Any]:
    """The folders of a dataset's config by what lies in them; MMPretrain may give one alone."""
    prefix = dataset.get('data_prefix') or {}
    return dict(img_path=prefix) if isinstance(prefix, str) else prefix


def dataset_class(cfg: Config, dataset: dict) -> type | None:
    """The class of a dataset; None where its name is not known."""
    name = dataset.get('type')
    if not isinstance(name, str):
        return name
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        return registry.get(name)


def single_pass(dataset: dict) -> dict:
    """A dataset without the wrappers that repeat or mix images; concatenated ones stay so."""
    if 'datasets' in dataset:
        return {**dataset, 'datasets': [single_pass(part) for part in dataset['datasets']]}
    return single_pass(dataset['dataset']) if 'dataset' in dataset else dataset
