"""Squeeze while training: live PEFT models, optimiser state, callbacks. Needs the extra `train`."""
