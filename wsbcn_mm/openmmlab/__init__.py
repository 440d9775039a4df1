"""Everything that knows OpenMMLab. Importing it registers layers and hooks, closes the host's gaps.

What is imported here needs mmengine alone; the other modules are imported by those who use them.
"""

from wsbcn_mm.openmmlab import compat, hooks, registry  # noqa: F401
from wsbcn_mm.openmmlab.data import reading

compat.apply()
reading.apply()
