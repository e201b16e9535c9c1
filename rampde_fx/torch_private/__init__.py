"""Every private interface of torch that rampde_fx touches, by purpose. No other file reads one.

A part is imported by its name, which says beside each call what of torch it is about, and that importing dynamo,
side_effects or kernels costs nothing: the others are for what compiles.
"""
