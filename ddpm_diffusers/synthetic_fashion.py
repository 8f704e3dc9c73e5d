"""Ten kinds of garment drawn by formula: a data set in the style of Fashion-MNIST that needs no download.

Every picture is a pure function of (seed, index). The random numbers come from a counter-based integer hash, and the
drawing uses only operations that IEEE 754 rounds exactly (+, -, *, /, sqrt, floor, min, max; no sin or exp), so the
result is bit-identical for any batch, order and platform.

Garments are signed distances, negative inside, over the square [-1, 1] x [-1, 1], with x to the right and y down. The
minimum of two distances is the union of their shapes, the maximum the intersection, and max(a, -b) is a without b.
"""

import numpy as np

SYNTHETIC = "synthetic-fashion"  # what `dataset_name` calls it
CLASS_NAMES = (
    "T - shirt / top",  # as in zalando-datasets/fashion_mnist
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_DRAWS = 32  # random numbers for each picture: its garment takes them in turn, the tint uses the last 3
_CHUNK_PIXELS = 1 << 16  # pixels drawn at a time, so that the work arrays stay in the CPU cache


def draw_garments(indices, seed=0, resolution=28, channels=1):
    """Draw the garments of the given indices.

    Args:
        indices: Integers from 0 to 2^63 - 1, array-like (N,); N may be 0. The class of index i is i % 10.
        seed: An int from 0 to 2^64 - 1; each seed gives another endless data set.
        resolution: Height and width in pixels, at least 8.
        channels: 1 for grey, 3 for RGB, with each garment in its own tint.

    Returns:
        Images, uint8 (N, channels, resolution, resolution) on a black background, and labels, int64 (N,), which index
        `CLASS_NAMES`.

    Raises:
        ValueError: If an index, the seed, the resolution or the number of channels is out of its range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"`seed` is {seed!r}; for {SYNTHETIC} it must be in [0, 2^64).")
    if resolution < 8:
        raise ValueError(f"`resolution` is {resolution!r}; for {SYNTHETIC} it must be at least 8.")
    if channels not in (1, 3):
        raise ValueError(f"`channels` is {channels!r}; it must be 1 (grey) or 3 (RGB).")

    given, indices = indices, np.asarray(indices)
    if indices.size and not 0 <= indices.min() <= indices.max() < 2**63:
        raise ValueError(f"`indices` is {given!r}; they must be from 0 to 2^63 - 1.")
    indices = indices.astype(np.int64)
    labels = indices % len(CLASS_NAMES)
    images = np.empty((len(indices), channels, resolution, resolution), np.uint8)
    step = max(1, _CHUNK_PIXELS // resolution**2)
    for label, garment in enumerate(_GARMENTS):
        members = np.flatnonzero(labels == label)
        for start in range(0, len(members), step):
            chosen = members[start : start + step]
            sketch = _Sketch(_uniforms(seed, indices[chosen]), resolution)
            distance, tone = garment(sketch)
            images[chosen] = sketch.develop(distance, tone, channels)
    return images, labels


def _mix(word):
    """SplitMix64's finaliser: uint64 array to uint64 array, each bit of the input affecting all of the output."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _uniforms(seed, indices):
    """float32 of shape (N, _DRAWS) in [0, 1): a hash of (seed, index, draw number), 24 bits each."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    keys = _mix(_mix(np.array([seed], np.uint64) + golden) + (indices.astype(np.uint64) + np.uint64(1)) * golden)
    words = _mix(keys[:, None] + np.arange(1, _DRAWS + 1, dtype=np.uint64) * golden)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


class _Sketch:
    """A chunk of pictures of one class: x, y and ax = |x| of shape (N, H, W), and draws of shape (N, 1, 1)."""

    def __init__(self, uniforms, side):
        self._uniforms, self._used = uniforms, 0
        self.pixel = np.float32(2 / side)
        xs = ((np.arange(side) + 0.5 - side / 2) * (2 / side)).astype(np.float32)
        ys = xs[:, None]
        tilt = self.draw(-0.035, 0.035)
        self.x = xs - self.draw(-0.03, 0.03) + tilt * ys
        self.y = ys - self.draw(-0.02, 0.02) - tilt * xs
        self.ax = np.abs(self.x)

    def draw(self, low, high):
        """The next random number of each picture, uniform between low and high (numbers or (N, 1, 1) arrays)."""
        self._used += 1
        return low + (high - low) * self._uniforms[:, self._used - 1, None, None]

    def chance(self, share):
        """1.0 in a random `share` of the pictures, 0.0 in the others."""
        return (self.draw(0, 1) < share).astype(np.float32)

    def cover(self, distance):
        """How much of each pixel lies inside a shape, 0 to 1: the soft edge is one pixel wide at any resolution."""
        return np.clip(0.5 - distance / self.pixel, 0, 1)

    def paint(self, tone, distance, value, strength=1.0):
        """`tone` with a shape of tone `value` painted over it."""
        return tone + (value - tone) * (self.cover(distance) * strength)

    def develop(self, distance, tone, channels):
        """Apply light, cloth and tint to a finished drawing: uint8 of shape (N, channels, H, W)."""
        x, y = self.x, self.y
        light = self.draw(0.55, 0.92) * (1 + self.draw(-0.12, 0.12) * x + self.draw(-0.1, 0.1) * y)
        folds = self.draw(0.0, 0.07) * _wave(x * self.draw(0.8, 1.8) + y * self.draw(-0.7, 0.7) + self.draw(0, 1))
        # Half of the garments are plain; the rest have stripes across, stripes down, or both (checks).
        weave, contrast, pitch = self.draw(0, 1), self.draw(0.05, 0.13), self.draw(1.6, 3.0)
        across, down = contrast * ((weave > 0.5) & (weave < 0.84)), contrast * (weave > 0.74)
        cloth = across * _wave(y * pitch + self.draw(0, 1)) + down * _wave(x * pitch)
        rim = 0.8 + 0.2 * np.clip(distance * -8, 0, 1)  # cloth turns away from the light at its edge
        grey = np.clip(light * tone * rim * (1 + folds + cloth), 0.04, 1) * self.cover(distance)
        tint = self._uniforms[:, -3:, None, None] * 0.75 + 0.25
        tint = tint / tint.max(axis=1, keepdims=True) if channels == 3 else 1
        return np.floor(grey[:, None] * tint * 255 + 0.5).astype(np.uint8)


def _wave(phase):
    """A smooth wave of period 1 between -1 and 1, made of cubics."""
    ramp = np.abs(phase - np.floor(phase) - 0.5) * 4 - 1
    return ramp * (1.5 - 0.5 * ramp * ramp)


def _ramp(at, start, low, end, high):
    """low up to start, high from end on, and a straight line in between."""
    return low + (high - low) * np.clip((at - start) / (end - start), 0, 1)


def _curve(at, start, low, end, high):
    """`_ramp` with a smooth S-curve instead of the straight line."""
    part = np.clip((at - start) / (end - start), 0, 1)
    return low + (high - low) * (part * part * (3 - 2 * part))


def _box(x, y, cx, cy, half_width, half_height, corner=0.0):
    """Distance to a box with rounded corners."""
    dx, dy = np.abs(x - cx) - (half_width - corner), np.abs(y - cy) - (half_height - corner)
    outside = np.sqrt(np.square(np.maximum(dx, 0)) + np.square(np.maximum(dy, 0)))
    return outside + np.minimum(np.maximum(dx, dy), 0) - corner


def _ellipse(x, y, cx, cy, rx, ry):
    """Distance to an ellipse, accurate to first order at its edge."""
    px, py = (x - cx) / rx, (y - cy) / ry
    size = np.sqrt(px * px + py * py)
    slope = np.sqrt(np.square(px / rx) + np.square(py / ry))
    return size * (size - 1) / (slope + 1e-6)


def _limb(x, y, x0, y0, x1, y1, r0, r1, flat=False):
    """Distance to a bar from (x0, y0) to (x1, y1), its half-width going from r0 to r1, its far end round or flat."""
    dx, dy = x1 - x0, y1 - y0
    square = dx * dx + dy * dy
    along = ((x - x0) * dx + (y - y0) * dy) / square
    part = np.clip(along, 0, 1)
    side = np.sqrt(np.square(x - x0 - part * dx) + np.square(y - y0 - part * dy)) - (r0 + (r1 - r0) * part)
    return np.maximum(side, (along - 1) * np.sqrt(square)) if flat else side


def _top(s, body, flare, hem, neck, cuff_x, cuff_y, wide, tight):
    """A top seen from the front, with seams at the armholes: (distance, tone, distance to the sleeves).

    `body` and `neck` are half-widths at the chest and neck, `flare` is how much wider the hem is than the chest, and
    `hem` its y. Sleeves end at (`cuff_x`, `cuff_y`); their half-width goes from `wide` at the shoulder to `tight`.
    """
    y, ax = s.y, s.ax
    shoulder = body + 0.02
    slant = 0.2 / (shoulder - neck)
    above = (-0.93 - y + slant * (ax - neck)) / np.sqrt(1 + slant * slant)
    side = ax - _ramp(y, -0.5, body, hem, body + flare)
    torso = np.maximum(np.maximum(side, y - hem), above)
    joint = body - wide + 0.06
    sleeve = _limb(ax, y, joint, wide - 0.76, cuff_x, cuff_y, wide, tight, flat=True)
    seam = np.maximum(np.abs(side + 0.02) - 0.02, sleeve)
    return np.minimum(torso, sleeve), s.paint(1.0, seam, 0.55), sleeve


# Each garment draws its measures from the sketch `s`, and returns its distance and tone (1: plain cloth), (N, H, W).


def _tshirt(s):
    neck, reach, wide = s.draw(0.17, 0.27), s.draw(0.8, 0.9), s.draw(0.19, 0.23)
    body, drop = s.draw(0.48, 0.58), s.draw(-0.34, -0.14)
    shape, tone, _ = _top(s, body, s.draw(-0.04, 0.05), s.draw(0.82, 0.94), neck, reach, drop, wide, wide - 0.02)
    collar = _ellipse(s.x, s.y, 0, -0.97, neck, s.draw(0.14, 0.3))
    tone = s.paint(tone, collar - 0.07, 0.82)
    # Some have a print on the chest, lighter or darker than the cloth.
    patch = _box(s.x, s.y, 0, s.draw(-0.25, 0.05), s.draw(0.15, 0.32), s.draw(0.1, 0.28), 0.08)
    tone = s.paint(tone, patch, 0.45 + 0.8 * s.chance(0.5), s.chance(0.35) * 0.8)
    return np.maximum(shape, -collar), tone


def _trouser(s):
    x, y, ax = s.x, s.y, s.ax
    waist, hip, crotch, gap = s.draw(0.3, 0.38), s.draw(0.38, 0.46), s.draw(-0.48, -0.3), s.draw(0.12, 0.2)
    leg = s.draw(0.24, 0.34)
    outer = ax - _ramp(y, crotch, _ramp(y, -0.93, waist, crotch, hip), 0.93, gap + leg)
    inner = _ramp(y, crotch, 0, 0.93, gap) + _ramp(y, crotch - 0.08, -0.08, crotch + 0.12, 0.02) - ax
    shape = np.maximum(np.maximum(outer, inner), np.abs(y) - s.draw(0.9, 0.95))
    tone = s.paint(1.0, np.abs(y + 0.76) - 0.02, 0.6)  # waistband
    crease = np.abs(ax - _ramp(y, crotch, waist * 0.55, 0.93, gap + leg * 0.5)) - 0.05
    tone = s.paint(tone, np.maximum(crease, crotch - y), 1.15, 0.8)
    return shape, s.paint(tone, _box(x, y, 0.02, -0.6, 0.02, 0.16), 0.65)


def _pullover(s):
    neck, body, hem = s.draw(0.17, 0.26), s.draw(0.46, 0.54), s.draw(0.8, 0.93)
    wide, tight, cuff_y = s.draw(0.18, 0.22), s.draw(0.1, 0.13), s.draw(0.58, 0.86)
    shape, tone, sleeve = _top(s, body, s.draw(-0.06, 0.0), hem, neck, s.draw(0.78, 0.83), cuff_y, wide, tight)
    rib = 0.72 + 0.5 * s.chance(0.3)
    tone = s.paint(tone, np.maximum(hem - 0.13 - s.y, s.ax - body), rib)
    tone = s.paint(tone, np.maximum(sleeve, cuff_y - 0.14 - s.y), rib)
    collar = _ellipse(s.x, s.y, 0, -0.96, neck, s.draw(0.1, 0.2))
    return np.maximum(shape, -collar), s.paint(tone, collar - 0.1, rib)


def _dress(s):
    x, y, ax = s.x, s.y, s.ax
    bust, waist_y, flare = s.draw(0.3, 0.38), s.draw(-0.3, -0.1), s.draw(0.25, 0.55)
    waist = bust - s.draw(0.06, 0.12)
    width = _curve(y, -0.6, bust, waist_y, waist) + _ramp(y, waist_y, 0, 0.93, flare)
    armhole = ax - _curve(y, -0.95, bust - 0.1, -0.45, 1.2)
    shape = np.maximum(np.maximum(ax - width, armhole) * 0.93, np.abs(y) - s.draw(0.91, 0.95))
    collar = _ellipse(x, y, 0, -0.97, bust * s.draw(0.3, 0.45), s.draw(0.2, 0.4))
    shape = np.maximum(shape, -collar)
    # Some have short sleeves; on the others, they are shrunk to nothing.
    sleeve = _limb(ax, y, bust - 0.12, -0.8, bust + 0.2, -0.5, 0.11, 0.1, flat=True)
    shape = np.minimum(shape, sleeve + 1 - s.chance(0.3))
    belt = np.abs(y - waist_y) - 0.05
    tone = s.paint(1.0, belt, 0.55 + 0.6 * s.chance(0.3), 0.8)
    pleats = 0.12 * _wave(x / (width + 0.1) * s.draw(1.5, 2.5) + s.draw(0, 1)) * _ramp(y, waist_y, 0, 0.5, 1)
    return shape, tone + pleats


def _coat(s):
    x, y, ax = s.x, s.y, s.ax
    neck, body = s.draw(0.2, 0.26), s.draw(0.46, 0.53)
    wide, cuff_y = s.draw(0.17, 0.21), s.draw(0.45, 0.68)
    shape, tone, _ = _top(s, body, s.draw(0.04, 0.1), 0.94, neck, s.draw(0.8, 0.85), cuff_y, wide, wide - 0.07)
    low = s.draw(-0.35, -0.05)  # where the lapels meet
    opening = ax - _ramp(y, -0.93, neck - 0.06, low, 0.0)
    tone = s.paint(tone, np.maximum(opening - 0.15, y - low), 1.2)
    tone = s.paint(tone, np.maximum(np.abs(opening - 0.15) - 0.02, y - low), 0.6)
    tone = s.paint(tone, np.maximum(opening, y - low), 0.22)
    # The two fronts fall apart a little towards the hem.
    front = np.abs(x - s.draw(-0.03, 0.03)) - _ramp(y, low, 0.045, 0.94, s.draw(0.05, 0.11))
    tone = s.paint(tone, np.maximum(front, low - 0.1 - y), 0.06)
    return shape, s.paint(tone, _box(ax, y, 0.33, s.draw(0.25, 0.4), 0.12, 0.03), 0.5)


def _sandal(s):
    x, y = s.x, s.y
    lift = s.draw(0.15, 0.7) * s.chance(0.7)  # height of the heel
    ground, strap, tall = 0.4 + lift * 0.45, s.draw(0.065, 0.09), s.draw(0.42, 0.55)
    heel = ground - lift
    bed, top = _curve(x, -0.4, ground - 0.02, 0.5, heel), heel - s.draw(0.6, 0.72)
    sole = np.maximum(np.abs(y - bed) * 0.85, np.abs(x) - 0.84) - s.draw(0.08, 0.11)
    stilt = _limb(x, y, 0.74, heel, 0.82, ground, 0.16, s.draw(0.06, 0.12))
    toe = np.maximum(np.abs(_ellipse(x, y, -0.5, ground, s.draw(0.26, 0.34), tall)) - strap * 1.2, y - bed)
    back = _limb(x, y, 0.74, heel, 0.82, top, 0.16, 0.06)
    ankle = np.abs(_ellipse(x, y + (x - 0.5) * 0.25, 0.52, top + 0.05, 0.32, 0.12)) - strap
    instep = _limb(x, y, 0.24, top + 0.12, s.draw(-0.4, -0.2), ground - tall + 0.06, strap, strap)
    tone = s.paint(1.5, y - bed - 0.02, s.draw(0.7, 1.1))
    return np.minimum.reduce([sole, stilt, toe, back, ankle, instep]), tone


def _shirt(s):
    x, y, ax = s.x, s.y, s.ax
    body, hem, short = s.draw(0.46, 0.54), s.draw(0.82, 0.94), s.chance(0.25)
    cuff_y = s.draw(0.45, 0.75) * (1 - short) - 0.2 * short
    wide, neck = s.draw(0.17, 0.2), s.draw(0.2, 0.26)
    shape, tone, sleeve = _top(s, body, s.draw(-0.02, 0.05), hem, neck, 0.82, cuff_y, wide, wide - 0.06 + 0.05 * short)
    tone = tone * 0.85
    tone = s.paint(tone, np.maximum(sleeve, cuff_y - 0.12 - y), 1.1)
    tone = s.paint(tone, ax - 0.1, 1.1)  # the placket, and the buttons down it
    button = np.abs(y * 3 - np.floor(y * 3) - 0.5) / 3
    tone = s.paint(tone, np.sqrt(button * button + x * x) - 0.06, 0.15)
    collar = _limb(ax, y, 0.06, -0.66, neck, -0.9, 0.1, 0.1)
    tone = s.paint(s.paint(tone, collar - 0.05, 0.4), collar, 1.25)
    hole = (ax - _ramp(y, -0.95, neck - 0.06, -0.7, 0)) * 0.8
    return np.maximum(np.minimum(shape, collar), -hole), tone


def _sneaker(s):
    x, y = s.x, s.y
    ground, sole = s.draw(0.4, 0.48), s.draw(0.09, 0.13)
    toe, throat, heel = s.draw(0.05, 0.15), s.draw(-0.42, -0.3), s.draw(-0.46, -0.34)
    # The upper edge, from the toe up the laces, down into the opening and up to the heel tab.
    ridge = _curve(x, -0.6, toe, 0.1, throat) + _curve(x, 0.1, 0, 0.4, 0.14)
    ridge = ridge + _curve(x, 0.5, 0, 0.88, heel - throat - 0.14)
    upper = np.maximum((ridge - y) * 0.8, np.abs(x - 0.15) - 0.75)
    cap = _ellipse(x, y, -0.55, ground - 0.04, 0.37, ground - 0.04 - toe)
    floor = _box(x, y, 0, ground - sole, 0.94, sole, 0.08)
    tone = s.paint(0.8, cap, s.draw(0.7, 1.0))
    badge = _limb(x, y, s.draw(-0.1, 0.1), 0.15, s.draw(0.2, 0.5), s.draw(-0.1, 0.05), 0.05, 0.07)
    tone = s.paint(tone, badge, 0.35 + 0.9 * s.chance(0.6), s.chance(0.7))
    lace = np.maximum(np.abs(ridge - y + 0.1) - 0.1, np.abs(x + 0.2) - 0.26)
    tone = s.paint(tone, lace, 0.75 + 0.4 * _wave(x * 5), 1.0)
    tone = s.paint(s.paint(tone, floor - 0.04, 0.35), floor, 1.2)  # a dark line, then the pale sole
    return np.minimum(np.maximum(np.minimum(upper, cap), y - ground), floor), tone


def _bag(s):
    x, y = s.x, s.y
    top, bottom, wide = s.draw(-0.35, -0.1), s.draw(0.68, 0.9), s.draw(0.74, 0.92)
    middle, tall = (top + bottom) * 0.5, (bottom - top) * 0.5
    taper = s.draw(-0.02, 0.16)
    body = _box(x * (1 - taper * (y - bottom)), y, 0, middle, wide, tall, s.draw(0.05, 0.16))
    rise = s.draw(0.45, 0.55)
    handle = np.abs(_ellipse(x, y, 0, top, s.draw(0.3, 0.58), rise)) - s.draw(0.055, 0.085)
    flap = top + tall * s.draw(0.3, 0.9)
    tone = s.paint(1.0, np.abs(y - flap) - 0.03, 0.5)
    tone = s.paint(tone, _box(x, y, 0, flap, 0.1, 0.1, 0.03), 0.3 + 1.0 * s.chance(0.5))
    return np.minimum(body, np.maximum(handle, y - top)), tone


def _ankle_boot(s):
    x, y = s.x, s.y
    lift = s.draw(0.1, 0.28)
    bed = _curve(x, -0.2, 0.9, 0.4, 0.9 - lift)  # the underside, arched between toe and heel
    toe, instep, front = s.draw(0.3, 0.42), s.draw(-0.25, 0.0), s.draw(-0.12, 0.0)
    back, shaft = s.draw(0.76, 0.86), s.draw(-0.93, -0.75)
    ridge = _curve(x, -0.75, toe + 0.1, front + 0.1, instep) - _ramp(x, front, 0, front + 0.08, 2)
    foot = np.maximum(np.maximum((ridge - y) * 0.7, np.abs(x - (back - 0.55) * 0.5) - (back + 0.55) * 0.5), shaft - y)
    cap = _ellipse(x, y, -0.5, 0.82, 0.43, 0.82 - toe)
    shape = np.maximum(np.minimum(foot, cap), y - bed)
    heel = _limb(x, y, back - 0.2, 0.8 - lift, back - 0.16, 0.92, 0.2, s.draw(0.1, 0.18), flat=True)
    tone = s.paint(1.0, bed - 0.1 - y, 0.55)
    tone = s.paint(tone, np.abs(y - shaft - 0.14) - 0.025, 0.65)
    # Some have elastic at the side, some others a strap round the ankle.
    gore = s.chance(0.4)
    tone = s.paint(tone, _box(x, y, (front + back) * 0.5 + 0.06, shaft + 0.4, 0.14, 0.32, 0.08), 0.5, gore)
    strap = np.abs(y - 0.12 - x * 0.2) - 0.06
    tone = s.paint(tone, strap, 0.6, s.chance(0.5) * (1 - gore))
    return np.minimum(shape, np.maximum(heel, bed - 0.05 - y)), tone


_GARMENTS = (_tshirt, _trouser, _pullover, _dress, _coat, _sandal, _shirt, _sneaker, _bag, _ankle_boot)
