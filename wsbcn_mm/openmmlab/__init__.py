"""Everything that knows OpenMMLab. Importing it registers the layers and closes the host's gaps.

What is imported here needs mmengine alone; the other modules are imported by those who use them.
"""

from wsbcn_mm.openmmlab import checkpoints, compat, layers, registry  # noqa: F401
from wsbcn_mm.openmmlab.hooks import checkpoints as _saving  # noqa: F401
from wsbcn_mm.openmmlab.hooks import diagnostics, estimates  # noqa: F401

compat.apply()
