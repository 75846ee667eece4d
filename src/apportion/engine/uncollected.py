"""Imported first by the process that workers are forked from: garbage collection would take a sixth of the time that
its imports take, and find none. Each worker turns it on again. Where an import fails, the coordinator says so in its
one line."""

import gc
import sys

gc.disable()
sys.excepthook = lambda *_: None
