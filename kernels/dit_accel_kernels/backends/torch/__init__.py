"""The torch backend: any device, any dtype, memory linear in the tokens."""
