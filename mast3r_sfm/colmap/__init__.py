"""The one place that imports pycolmap: databases, models, triangulation and bundle adjustment.

pycolmap logs through glog to stderr; only its fatal messages are let through, since everything else reaches the user as
an error or a warning of ours.
"""

# Before pycolmap: its binary brings a zlib of its own, with which that of Python crashes if it is loaded after it.
import zlib  # noqa: F401

import pycolmap

pycolmap.logging.minloglevel = int(pycolmap.logging.FATAL.value)
