"""Everything that knows OpenMMLab. Importing it registers the layers and closes the host's gaps.

What is imported here needs mmengine alone; the other modules are imported by those who use them.
"""

from wsbcn_mm.openmmlab import (  # noqa: F401
    checkpoint,
    compat,
    converted,
    hooks,
    registry,
    saving,
)

compat.apply()
