"""DGS-Net: fine-tune CLIP with gradient surgery into a detector of generated images, and use it.

>>> from dgsnet import Detector  # doctest: +SKIP
>>> Detector.load("runs/demo/model").predict(["photo.jpg"])  # doctest: +SKIP
array([0.03121], dtype=float32)
"""

from dgsnet.detection.detector import Detector

__all__ = ["Detector"]
