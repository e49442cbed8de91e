"""Trainings that went wrong in public, written anew, each beside the same one as the accepted answer repairs it."""
