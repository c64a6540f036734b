"""What travels and how: messages and codecs. No pickle, no trust."""
