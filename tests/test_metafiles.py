"""model-index.yml and the metafiles: every config once, and no result claimed that is not ours."""

from pathlib import Path

import pytest

yaml = pytest.importorskip('yaml', reason='the metafiles are YAML')

ROOT = Path(__file__).parents[1]
INDEX = yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']
MODELS = [
    dict(model, metafile=path)
    for path in INDEX
    for model in yaml.safe_load((ROOT / path).read_text())['Models']
]


def test_the_index_names_every_metafile():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').rglob('metafile.yml')}
    assert len(INDEX) == len(set(INDEX)) and set(INDEX) == found


def test_every_config_is_listed_once_in_its_folder():
    listed = [model['Config'] for model in MODELS]
    configs = ROOT / 'configs'
    found = {
        path.relative_to(ROOT).as_posix()
        for path in configs.rglob('*.py')
        if '_base_' not in path.relative_to(configs).parts
    }
    assert len(listed) == len(set(listed)) and set(listed) == found
    for model in MODELS:
        config = Path(model['Config'])
        assert model['Name'] == config.stem
        assert config.parent == Path(model['metafile']).parent


def test_numbers_of_others_carry_their_source_and_none_is_ours():
    sources = set()
    for model in MODELS:
        assert 'Results' not in model and 'Weights' not in model
        for reported in (model.get('Metadata') or {}).get('Reported elsewhere', []):
            numbers = {key: value for key, value in reported.items() if key != 'Source'}
            assert numbers and all(isinstance(value, float) for value in numbers.values())
            assert 'not ours' in reported['Source'] and len(reported['Source']) > 30
            sources.add(reported['Source'].partition(',')[0])
    assert len(sources) >= 3
