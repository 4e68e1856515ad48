"""Published numbers of caches by model: MagCache's ratios, TeaCache's polynomials, ProfilingDiT's blocks; all measured.

They are facts about weights: those of a fine-tune differ, `dit-accel tune magcache` and `tune teacache` measure them.
"""

from collections.abc import Mapping
from typing import Any

Recipe = Mapping[str, Any]


# MagCache, arXiv 2506.09045: ratios of its released code (Zehong-Ma/MagCache), those of the conditional branch; the
# unconditional one's differ by less than .001, but for the first steps. Threshold, K and retention as it runs them.
# Wan 2.2's experts change where the noise level does, after 26 of 40 steps (shift 12, boundary .875) or 15 (5, .9).
# From text, retention is counted in each expert's steps: .4 of 26, rounded down to 10, and of 14, rounded up to 6,
# which .38 rounded up is in both. From an image, nothing is skipped in the first expert. FLUX.1 never skips the step
# that is the nearest to 11 of 28.
_FURTHER: Mapping[str, Recipe] = {
    "wan2.2-a14b": {"warmup_of": "each"},
    "wan2.2-i2v-a14b": {"warmup_of": "last"},
    "flux.1-dev": {"compute_at": (11 / 27,)},
    "flux.1-kontext-dev": {"compute_at": (11 / 27,)},
}
# Model, threshold, max_consecutive, warmup_steps; then the ratios, which begin with step 1. `dit-accel tune
# magcache` gave those of the embedded models: what is stored is output minus latents, in 20 steps.
_MAGCACHE = """
[wan2.1-14b 0.12 4 0.2]
1.02504 1.00025 0.9985 0.99779 0.9966 0.99482 0.99467 0.99664 0.99434 0.99533 0.99468 0.99438 0.99516
0.99384 0.99404 0.99517 0.99409 0.99428 0.99347 0.99418 0.99271 0.99313 0.99215 0.99218 0.99216 0.99163
0.99138 0.98982 0.98996 0.9887 0.98772 0.98767 0.98573 0.98501 0.9838 0.98177 0.98037 0.97678 0.97546
0.97184 0.96711 0.96349 0.95629 0.94926 0.93964 0.92511 0.90693 0.8796 0.86111
[wan2.1-1.3b 0.12 2 0.2]
1.0124 1.00166 0.99791 0.99682 0.99634 0.99567 0.99416 0.99578 0.9957 0.99511 0.99535 0.99552 0.99541 0.9954
0.99489 0.99518 0.99484 0.99481 0.99415 0.99419 0.99396 0.99388 0.99349 0.99309 0.9927 0.99228 0.99171
0.99137 0.99068 0.99005 0.98944 0.98849 0.98758 0.98644 0.98504 0.9836 0.98202 0.97977 0.97717 0.9741
0.97003 0.96538 0.9593 0.95086 0.94013 0.92402 0.90241 0.86821 0.81838
[wan2.1-i2v-14b-480p 0.12 4 0.2]
0.98783 0.97559 0.98311 0.98202 0.9888 0.98762 0.98957 0.99052 0.99383 0.98857 0.99065 0.98845 0.99057
0.98957 0.98601 0.98823 0.98756 0.98808 0.98721 0.98571 0.98543 0.98157 0.98411 0.97952 0.98149 0.9774
0.97825 0.97355 0.97085 0.97056 0.96588 0.96113 0.9567 0.94961 0.93973 0.93217 0.91878 0.90955 0.92617
[wan2.1-i2v-14b-720p 0.12 4 0.2]
0.99428 0.98588 0.98273 0.99018 0.98911 0.98646 0.99454 0.9891 0.99124 0.99102 0.99215 0.99515 0.99576
0.99068 0.99097 0.99166 0.99041 0.99201 0.99101 0.98599 0.98845 0.98848 0.98862 0.98718 0.98497 0.98264
0.98389 0.97938 0.97535 0.97498 0.973 0.96827 0.96261 0.95335 0.94649 0.93397 0.91636 0.89088 0.8679
[wan2.2-a14b 0.06 2 0.38]
1.00124 0.99822 0.99696 0.99703 0.9966 0.99602 0.99578 0.99484 0.99633 0.99659 0.99534 0.99584 0.99681
0.99563 0.9944 0.99594 0.99466 0.99453 0.99389 0.99391 0.99354 0.99283 0.99268 0.99057 0.99125 0.65523
0.98808 0.98765 0.9851 0.98311 0.9805 0.97776 0.97278 0.96731 0.95857 0.94385 0.92118 0.88108 0.80263
[wan2.2-i2v-a14b 0.06 2 0.1]
0.99191 0.99356 0.99326 0.99251 0.99393 0.9943 0.99276 0.99389 0.99274 0.99316 0.99379 0.99268 0.99222
0.99175 0.91076 0.98931 0.99087 0.98852 0.98895 0.98806 0.9871 0.98613 0.98434 0.983 0.98185 0.98131 0.9783
0.97619 0.97264 0.97088 0.96568 0.96045 0.95322 0.94579 0.93297 0.91699 0.89174 0.8541 0.79823
[wan2.2-ti2v-5b 0.06 2 0.2]
0.99505 0.99441 0.99558 0.99499 0.99534 0.99468 0.99463 0.9946 0.99408 0.9945 0.99409 0.99403 0.99382
0.99349 0.99377 0.9933 0.99303 0.99217 0.992 0.99201 0.99133 0.99112 0.99155 0.98958 0.98959 0.98838 0.98826
0.9883 0.98711 0.98562 0.98511 0.98414 0.98284 0.98104 0.97981 0.97849 0.97557 0.97398 0.97171 0.96917
0.96511 0.96263 0.95839 0.95483 0.94942 0.9468 0.94583 0.94843 0.96949
[hunyuan-video 0.12 4 0.2]
1.0754 1.27807 1.11596 1.09504 1.05188 1.00844 1.05779 1.00657 1.04142 1.03101 1.00679 1.02556 1.00908
1.06949 1.05438 1.02214 1.02321 1.03019 1.00779 1.03381 1.01886 1.01161 1.02968 1.00544 1.02822 1.00689
1.02119 1.0105 1.01044 1.01572 1.02972 1.0094 1.02368 1.0226 0.98965 1.01588 1.02146 1.0018 1.01687 0.99436
1.00283 1.01139 0.97122 0.98251 0.94513 0.97656 0.90943 0.85703 0.75456
[flux.1-dev 0.24 5 0.1]
1.21094 1.11719 1.07812 1.0625 1.03906 1.03125 1.03906 1.02344 1.03125 1.02344 0.98047 1.01562 1.00781 1
1.00781 1 1.00781 1 1 0.99609 0.99609 0.98047 0.98828 0.96484 0.95703 0.93359 0.89062
[flux.1-kontext-dev 0.05 4 0.2]
1.19531 1.07812 1.02344 1.03125 1.00781 1.02344 1.01562 1.01562 1 1.01562 1 1.00781 1 1.00781 1 1.00781
0.99609 1.01562 0.99219 1 0.99219 0.98438 0.99609 0.96484 0.96094 0.9375 0.93359
[qwen-image 0.06 2 0.2]
1.64062 1.45312 1.1875 1.17188 1.05469 1.21094 1.10938 1.11719 1.13281 1.11719 1.07812 1.07031 1.08594
1.08594 1.07812 1.03906 1.04688 1.07812 1.07031 1.03125 1.07812 1.04688 1.04688 1.04688 1.03906 1.01562
1.03125 1.02344 1.02344 1.02344 1.03906 1 1.01562 1 0.99219 1.00781 0.98047 0.95703 0.96875 0.99219 0.92578
0.92578 0.90625 0.85938 0.80469 0.87891 0.75 0.60938 0.55078
[wan-plain 0.12 4 0.2]
1.0402 1.02055 1.05165 1.03166 1.02833 1.01929 1.02566 1.02939 1.0215 1.01773 1.02205 1.02548 1.03022 1.0326
1.04143 1.05057 1.06363 1.1025 1.14175
[wan-tiny 0.12 4 0.2]
1.05074 1.12658 1.15644 1.04492 1.05619 1.02183 1.03647 1.02324 1.03397 1.02658 1.03427 1.03609 1.0402 1.04532
1.05133 1.06272 1.06423 1.08999 1.09267
[flux-tiny 0.12 4 0.2]
1.08004 1.11482 1.10373 1.0849 1.07397 1.07523 1.05446 1.05469 1.05021 1.05089 1.0513 1.05141 1.05255 1.05161
1.05424 1.04962 1.04969 1.04309 1.00225
"""


def _magcache(block: str) -> tuple[str, Recipe]:
    """Return the model and the recipe of a block of the table; no step comes before step 0, whose ratio is 1."""
    head, _, ratios = block.partition("]")
    name, threshold, max_consecutive, warmup_steps = head.split()
    return name, {
        **_FURTHER.get(name, {}),
        "threshold": float(threshold),
        "max_consecutive": int(max_consecutive),
        "warmup_steps": float(warmup_steps),
        "ratios": (1.0, *map(float, ratios.split())),
    }


MAGCACHE: Mapping[str, Recipe] = dict(map(_magcache, _MAGCACHE.split("[")[1:]))


def _teacache(threshold: float, *polynomial: float) -> Recipe:
    """Return a recipe of TeaCache; coefficients from the fourth power down."""
    return {"threshold": threshold, "polynomial": polynomial}


# TeaCache, arXiv 2411.19108: polynomials and lowest thresholds of its released code (ali-vilab/TeaCache). Wan's are
# those of the timestep embedding, with first and last step computed; the others' of block 0's modulated input.
_COGVIDEOX_5B = _teacache(0.1, -1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339)

TEACACHE: Mapping[str, Recipe] = {
    "wan2.1-1.3b": _teacache(0.05, 2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1-14b": _teacache(0.14, -5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1-i2v-14b-480p": _teacache(0.13, -302.33167, 223.948934, -52.546397, 5.8734844, -0.201973289),
    "wan2.1-i2v-14b-720p": _teacache(0.18, -114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    "hunyuan-video": _teacache(0.1, 733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "ltx-video-2b": _teacache(0.03, 21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "mochi-1": _teacache(0.06, -3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "cogvideox-2b": _teacache(0.1, -31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox-5b": _COGVIDEOX_5B,
    "cogvideox1.5-5b": _teacache(0.1, 250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "cogvideox1.5-5b-i2v": _teacache(0.1, 122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
    "flux.1-dev": _teacache(0.25, 498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    # dit-accel tune teacache --model wan-plain -o teacache.toml: of the timestep embedding, in 20 steps.
    "wan-plain": _teacache(0.1, 855.864716, -489.814851, 98.1080102, -7.69469712, 0.238101971),
    # the same with --model wan-tiny: off by .056 where the changes spread by .073
    "wan-tiny": _teacache(0.1, 3382.8281, -1485.7823, 214.605233, -10.7487726, 0.230696013),
    # the same with --model flux-tiny: it tells little (off by .034 where the changes spread by .039)
    "flux-tiny": _teacache(0.1, 1726.39201, -1098.56426, 232.651236, -18.7804801, 0.583429096),
}

# The same code's mode use_ret_steps: of the projected timestep embedding; five steps first and no last one.
_RET: Recipe = {"warmup_steps": 5, "last_steps": 0}
TEACACHE_RET: Mapping[str, Recipe] = {
    "wan2.1-1.3b": {**_RET, **_teacache(0.05, -52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664)},
    "wan2.1-14b": {**_RET, **_teacache(0.1, -303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525)},
    "wan2.1-i2v-14b-480p": {**_RET, **_teacache(0.2, 257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977)},
    "wan2.1-i2v-14b-720p": {**_RET, **_teacache(0.2, 8107.0546, 2133.93892, -372.934672, 16.6203073, -0.0417769401)},
}

# ProfilingDiT, arXiv 2504.03140: the blocks that its released code caches (two of its names for them are swapped), and
# the steps at which they run, of 50. Wan's are published for text to video; HunyuanVideo's two kinds of blocks have
# schedules of their own, and its single blocks are numbered on from the 20 double ones.
PROFILINGCACHE: Mapping[str, Recipe] = {
    "wan2.1-14b": {"blocks": "0, 2-7, 10-20, 25-32, 37-38", "every": 6, "measured_steps": 50, "warmup_steps": 0.12},
    "hunyuan-video": {
        "blocks": "20, 22, 24-27, 30-41, 43, 45-47, 51, 53",
        "refresh": (6, 18, 26, 32, 38, 42, 46, 48),
        "blocks_2": "6-19",
        "refresh_2": (6, 12, 18, 24, 30, 36, 42, 48),
        "measured_steps": 50,
        "warmup_steps": 0.12,
    },
}
