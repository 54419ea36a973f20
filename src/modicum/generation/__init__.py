"""The parts of `modicum.generate`: what is asked, the chunked prefill, the decoding, the text."""
