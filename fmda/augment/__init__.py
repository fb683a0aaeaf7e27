"""Random changes of batches on the device: pure functions of a key, to be called inside a jitted step."""
