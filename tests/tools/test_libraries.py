"""Models of other libraries: converted, trained, evaluated, folded; skips where one is missing."""

import importlib

import pytest
from libraries import LIBRARIES, MODELS, examine

from wsbcn_mm.convert import convert_model

PER_LIBRARY = 3  # the first ones: the whole list takes minutes
SAMPLE = [m for name in LIBRARIES for m in [x for x in MODELS if x.library == name][:PER_LIBRARY]]
SENTENCE = r'folds BatchNorms into raw weights.*\n.*use wsbcn_mm\.fold'


def imported(name):
    """A library, or a skip; one whose parts do not fit the installed torch raises RuntimeError."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f'{name} cannot be imported: {str(error).splitlines()[0]}')


@pytest.mark.filterwarnings('ignore')  # of the libraries about their own futures
@pytest.mark.parametrize('model', SAMPLE, ids=lambda m: f'{m.library} {m.name}')
def test_a_model_of_another_library(model):
    imported(model.library)
    outcome = examine(model)
    assert outcome.report.changed and outcome.kept == {}
    assert outcome.error < 1e-9


FOLDING = {
    'yolov8n': lambda network: network.fuse(),
    'repvgg_a0': lambda network: importlib.import_module('timm.utils').reparameterize_model(
        network
    ),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', FOLDING)
def test_the_ways_in_which_libraries_fold_point_to_ours(name):
    model = next(m for m in MODELS if m.name == name)
    imported(model.library)
    network = model.make().eval()
    convert_model(network, model.arguments(False))
    with pytest.raises(RuntimeError, match=SENTENCE):
        FOLDING[name](network)
