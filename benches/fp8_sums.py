"""How exact sums of FP8 products are on tensor cores of Ada, Hopper and sm_120, as MMA-Sim (arXiv 2511.10909) models them, against the
exact result. usage: python3 benches/fp8_sums.py   (numpy)"""
import numpy as np

RANDOM = np.random.default_rng(1)


def e4m3(x):
    a = np.minimum(np.abs(x), 448.0)
    unit = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(a, 1e-30))), -6) - 3)
    return np.sign(x) * np.round(a / unit) * unit


def exponent(x):
    return np.where(x == 0, -1000, np.frexp(x)[1] - 1).astype(float)


def fused(products, exponents, before, bits, kept):
    """Terms cut off `bits` below the largest exponent (of products: the sum of the factors'), the result to `kept` bits."""
    top = np.maximum(exponents.max(-1), exponent(before))
    unit = 2.0 ** (top - bits)
    sums = (np.trunc(products / unit[..., None]).sum(-1) + np.trunc(before / unit)) * unit
    unit = 2.0 ** (np.where(sums == 0, 0, exponent(sums)) - kept)
    return np.trunc(sums / unit) * unit


def product(a, b, bits, kept, at_once, promoted):
    """a · b^T; `at_once` products in one sum, begun from zero and added in f32 every `promoted` columns."""
    ea, eb = (np.maximum(np.where(v == 0, -6, exponent(v)), -6) for v in (a, b))
    total = np.zeros((len(a), len(b)), np.float32)
    part = np.zeros(total.shape)
    for k in range(0, a.shape[1], at_once):
        of = slice(k, k + at_once)
        p = a[:, None, of] * b[None, :, of]
        part = fused(p, np.where(p == 0, -1000.0, ea[:, None, of] + eb[None, :, of]), part, bits, kept)
        if (k + at_once) % promoted == 0:
            total, part = total + part.astype(np.float32), np.zeros(total.shape)
    return total + part.astype(np.float32)


def in_f32(a, b):
    total = np.zeros((len(a), len(b)), np.float32)
    for k in range(a.shape[1]):
        total += (a[:, k : k + 1] * b[:, k : k + 1].T).astype(np.float32)
    return total


WAYS = [
    ("f32, one after another", in_f32),
    ("sm_120, slices of K/8", lambda a, b: product(a, b, 25, 23, 32, a.shape[1] // 8)),
    ("sm_89, promoted every 32", lambda a, b: product(a, b, 13, 13, 16, 32)),
    ("sm_89, promoted every 128", lambda a, b: product(a, b, 13, 13, 16, 128)),
    ("sm_90a, promoted every 32", lambda a, b: product(a, b, 13, 13, 32, 32)),
    ("sm_90a, promoted every 128", lambda a, b: product(a, b, 13, 13, 32, 128)),
]
DRAWS = {
    "normal": lambda s: RANDOM.normal(size=s),
    "Student's t, 3": lambda s: RANDOM.standard_t(3, size=s),
    "all positive": lambda s: np.abs(RANDOM.normal(size=s)),
}

print(f"{'inputs and weights':20s} {'K':>5s} {'sums':28s} {'RMS / RMS':>10s} {'largest / RMS':>14s}")
for name, draw in DRAWS.items():
    for k in (256, 4096):
        a, b = (e4m3(v / np.abs(v).max(1, keepdims=True) * 448) for v in (draw((24, k)), draw((24, k))))
        exact = a @ b.T
        size = np.sqrt((exact**2).mean())
        for way, compute in WAYS:
            error = compute(a, b) - exact
            print(f"{name:20s} {k:5d} {way:28s} {np.sqrt((error**2).mean()) / size:10.1e} {np.abs(error).max() / size:14.1e}")
