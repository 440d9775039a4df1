"""Everything that knows OpenMMLab. Importing it registers the layers and closes the host's gaps.

`registry` and `compat` need mmengine alone; the other modules are imported by those who use them.
"""

from wsbcn_mm.openmmlab import compat, registry  # noqa: F401

compat.apply()
