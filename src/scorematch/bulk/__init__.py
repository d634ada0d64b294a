"""Sampling of many images with any number of processes, into files or batch by batch.

Image i has its own random generator, whose seed depends only on the seed of the job and on i. The network processes
images in fixed batches: with a batch size of B, batch b has the images from b B to (b + 1) B - 1. Process k of m draws
the batches k, k + m, k + 2 m, ... An image is therefore the same in every job with the same seed, whatever the number
of images and processes, and whether the job was interrupted. With the same batch size and number of threads it is
bitwise the same; with another batch size the results of the network are rounded differently.

A folder of samples contains

=====================  ================================================================================================
samples.json           the settings, which an interrupted job needs to continue; the versions; the command
images/000123.png      one file per image, or
images/000128.npz      one file per batch, named by its first image: ``arr_0``, uint8 (B, H, W, C), and with classes
                       ``arr_1``, int64 (B,), as in the sample files of guided-diffusion (Dhariwal & Nichol, 2021)
labels.csv             the class of each PNG file, for class-conditional networks
=====================  ================================================================================================

``images`` has no other files and no subfolders, so that evaluation programs can read it. Files are written atomically:
each is written under a temporary name and then renamed.
"""

from scorematch.bulk.batches import Batch
from scorematch.bulk.folder import sample_to
from scorematch.bulk.job import bulk_samples
from scorematch.bulk.stored import read_samples, stored_samples, stored_settings

__all__ = ["Batch", "bulk_samples", "read_samples", "sample_to", "stored_samples", "stored_settings"]
