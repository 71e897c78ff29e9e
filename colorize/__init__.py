"""Colour for black-and-white photographs.

>>> from colorize import Colorizer
>>> colorizer = Colorizer.from_pretrained("checkpoints/efficient-unet-gan")
>>> colorizer("photo.jpg").save("colour.png")
"""

from .colorizer import Colorizer
from .film import FilmError, colorize_film
from .hub import CheckpointError, load, snapshots
from .picture import Picture, PictureError, read

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "Colorizer",
    "FilmError",
    "Picture",
    "PictureError",
    "colorize_film",
    "load",
    "read",
    "snapshots",
]
