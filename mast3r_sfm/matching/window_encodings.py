"""Windows of photos after the encoder, each once as long as the memory for them lasts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from mast3r_sfm.images.framing import Box
from mast3r_sfm.images.loading import DecodedPhoto
from mast3r_sfm.models.base import DenseModel
from mast3r_sfm.types import Encoding

CACHE_BYTES = 1 << 30
"""Memory for encoded windows that other pairs may want again: 650 of the official network at 512×384."""
PHOTOS_IN_MEMORY = 2
"""Decoded photos: those of a pair. One of 48 megapixels takes 192 MB."""

_Key = tuple[int, Box, tuple[int, int]]


class WindowEncodings:
    """Cuts windows from photos and encodes them; not for use from several threads at once."""

    def __init__(
        self,
        model: DenseModel,
        decode: Callable[[int], DecodedPhoto],
        *,
        cache_bytes: int = CACHE_BYTES,
        photos: int = PHOTOS_IN_MEMORY,
    ) -> None:
        """Nothing is read yet.

        Args:
            model: encodes them.
            decode: gives all pixels of the photo of an image index.
            cache_bytes: of encodings that are kept, those used last; what `get` returns comes on top.
            photos: decoded photos that are kept, those used last.
        """
        self._model, self._decode = model, decode
        self._cache_bytes, self._max_photos = cache_bytes, photos
        self._photos: OrderedDict[int, DecodedPhoto] = OrderedDict()
        self._encodings: OrderedDict[_Key, Encoding] = OrderedDict()
        self._bytes = 0

    def get(self, image: int, boxes: Sequence[Box], size: tuple[int, int]) -> list[Encoding]:
        """The encodings of windows of a photo, which the network sees in one size.

        Raises:
            InputError: the photo cannot be read.
        """
        keys: list[_Key] = [(image, box, size) for box in boxes]
        served = {key: self._encodings[key] for key in keys if key in self._encodings}
        missing = [key for key in dict.fromkeys(keys) if key not in served]
        for start in range(0, len(missing), self._model.images_at_once):
            some = missing[start : start + self._model.images_at_once]
            photo = self._photo(image)
            encoded = self._model.encode([photo.window(box, size) for _, box, size in some])
            served.update(zip(some, encoded, strict=True))
        self._keep(served)
        return [served[key] for key in keys]

    def _photo(self, image: int) -> DecodedPhoto:
        if image not in self._photos:
            while len(self._photos) >= self._max_photos:
                self._photos.popitem(last=False)
            self._photos[image] = self._decode(image)
        self._photos.move_to_end(image)
        return self._photos[image]

    def _keep(self, served: dict[_Key, Encoding]) -> None:
        for key, encoding in served.items():
            if key not in self._encodings:
                self._bytes += _size(encoding)
            self._encodings[key] = encoding
            self._encodings.move_to_end(key)
        while self._bytes > self._cache_bytes:
            _, encoding = self._encodings.popitem(last=False)
            self._bytes -= _size(encoding)


def _size(encoding: Encoding) -> int:
    return encoding.tokens.nbytes + encoding.xy.nbytes + encoding.attention.nbytes
