"""The table of noise streams: which random numbers are independent of which."""

from __future__ import annotations

import enum

__all__ = ["Stream"]


class Stream(enum.IntEnum):
    """What a random number is for; part of the Philox counter, so no two uses ever share a number.

    Two calls with the same seed, path and index but different streams give independent numbers. Numbers are never
    reassigned: results made with one release can be replayed with the next. Any integer from 0 to 255 is a stream;
    those above the table are free for users.
    """

    DRIVING = 0  # Brownian increments that drive an SDE
    INITIAL = 1  # the state at the start: prior samples
    BRIDGE = 2  # halves of a Brownian motion within a step
    CORRECTOR = 3  # Langevin correctors between predictor steps
    PERTURBATION = 4  # training: z in x_t = alpha_t x_0 + sigma_t z
    TIMES = 5  # training: the times t
    PROBES = 6  # Hutchinson probes of a divergence
    DATA = 7  # samples from analytic data laws
    DATA_ORDER = 8  # which rows of a data set come when
    DEQUANTISATION = 9  # uniform noise that turns integers into densities
    DROPOUT = 10  # training: which labels are dropped
    LEVY = 11  # space-time Levy area, independent of the increments
    ACCEPTANCE = 12  # which proposals of a Markov chain are accepted
    VELOCITY = 13  # velocities at the start of underdamped dynamics
    SEEDS = 14  # words that seed what has no stream of its own, such as the halves below depth 20 of a step
    LEVY_K = 15  # space-time-time Levy area, independent of increments and space-time areas
    AREA = 16  # Levy areas between channels, given the three
    JUMP = 17  # times of jumps
    MARK = 18  # sizes of jumps
    SIGNS = 19  # two-point numbers of weak schemes beside the increments
    PASSAGE = 20  # within a step, given its ends: extremes, whether a boundary was met, and when
    SCRAMBLING = 21  # matrices and shifts that Sobol points are scrambled with; the dimension in place of the path
    PARTS = 22  # of a Brownian motion over a step that a jump cuts in two
    PAIRING = 23  # training: which sample of a source goes with which of a target
    RESAMPLING = 24  # which particles of a sequential Monte Carlo run go on
