"""An objective of the tests: how bright a clip is."""


def brightness(clip, prompt):
    return float(clip.mean())


def broken(clip, prompt):
    return float("nan")
