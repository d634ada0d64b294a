"""A fuzzer for everything that the package reads from files.

``mutators`` damages the content of files, ``kinds`` has the undamaged files and the functions that read them, and
``judge`` runs one case and checks the outcome. ``python -m tests.fuzz`` runs many cases, or one.
"""
