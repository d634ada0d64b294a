"""What every other part of the package stands on: the interface of a score, checks, files, random numbers."""
