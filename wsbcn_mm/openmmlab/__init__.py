"""Everything that knows OpenMMLab. Importing it registers the layers and closes the host's gaps.

`registry`, `hooks`, `saving` and `compat` need mmengine alone; the others are imported by those
who use them.
"""

from wsbcn_mm.openmmlab import compat, hooks, registry, saving  # noqa: F401

compat.apply()
