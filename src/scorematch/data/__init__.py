"""Where data come from: folders of pictures, arrays, data sets, folders of samples; and pictures read and written."""

from scorematch.data.array_data import ArrayData, open_arrays
from scorematch.data.images import ImageData, open_images
from scorematch.data.pictures import (
    ENDINGS,
    grid,
    list_pictures,
    read_image,
    read_mask,
    save_animation,
    save_grid,
    save_image,
    to_uint8,
)
from scorematch.data.plots import save_plot
from scorematch.data.samples import Batch, read_samples, stored_samples, stored_settings
from scorematch.data.tables import REFERENCES

__all__ = [
    "ENDINGS",
    "REFERENCES",
    "ArrayData",
    "Batch",
    "ImageData",
    "grid",
    "list_pictures",
    "open_arrays",
    "open_images",
    "read_image",
    "read_mask",
    "read_samples",
    "save_animation",
    "save_grid",
    "save_image",
    "save_plot",
    "stored_samples",
    "stored_settings",
    "to_uint8",
]
