"""The theorems behind trpo_min.py as property tests; one property a test, named as a sentence.

The oracles are dense and slow on purpose, and share no code with the file: the network is written out in NumPy, its
Jacobian comes from complex steps, F is a sum of matrices.  Tolerances are eps times the number of roundings times a
bound on the absolute values that are added up (tolerance below), so they follow the case instead of being guessed.
"""

import contextlib
import copy
import fcntl
import functools
import importlib.util
import io
import json
import multiprocessing
import operator
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
from gymnasium import spaces
from gymnasium.utils import EzPickle
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import HealthCheck, Phase, assume, event, given, settings
from hypothesis import strategies as st

import trpo_min as tm

EPS = np.finfo(np.float64).eps
HERE = Path(__file__).parent

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
common = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=60, **common)
settings.register_profile("quick", max_examples=15, phases=NO_SHRINKING, database=None, **common)
settings.register_profile("fuzz", max_examples=100_000, phases=NO_SHRINKING, database=None, **common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def isclose(a, b, rtol=1e-12, atol=0.0):
    """np.isclose without its absolute tolerance of 1e-8, in which small numbers are all alike."""
    return np.isclose(a, b, rtol=rtol, atol=atol)


def allclose(a, b, rtol=1e-12, atol=0.0):
    return isclose(a, b, rtol, atol).all()


# ============================================================================================================ oracles
class Case(NamedTuple):
    policy: tm.Policy
    theta: np.ndarray
    obs: np.ndarray
    rng: np.random.Generator


def layers(policy, theta):
    """[(W, b)], log_std: theta taken apart."""
    out, at = [], 0
    for m, n in zip(policy.sizes, policy.sizes[1:], strict=False):
        out.append((theta[at : at + m * n].reshape(m, n), theta[at + m * n : at + m * n + n]))
        at += (m + 1) * n
    return out, theta[at:]


def dense_forward(policy, theta, obs):
    """mu (N, K), written out; accepts complex theta."""
    weights, log_std = layers(policy, theta)
    h = obs
    for i, (W, b) in enumerate(weights):
        h = h @ W + b
        h = np.tanh(h) if i < len(weights) - 1 else h
    return np.concatenate([h, np.tile(log_std, (len(obs), 1))], axis=1) if policy.head == "gaussian" else h


def dense_jacobian(policy, theta, obs):
    """J (N, K, P) by complex steps: exact to rounding, as no difference is taken."""
    columns = []
    for k in range(len(theta)):
        moved = theta.astype(complex)
        moved[k] += 1e-30j
        columns.append(dense_forward(policy, moved, obs).imag / 1e-30)
    return np.stack(columns, axis=2)


def groups(policy):
    at = 0
    for n in policy.nvec:
        yield slice(at, at + n)
        at += n


def dense_metric(policy, mu):
    """M (N, K, K), matrix by matrix."""
    out = np.zeros((*mu.shape, mu.shape[1]))
    for n, row in enumerate(mu):
        if policy.head == "gaussian":
            A = len(row) // 2
            out[n] = np.diag(np.concatenate([np.exp(-2 * row[A:]), np.full(A, 2.0)]))
        else:
            for g in groups(policy):
                p = scipy.special.softmax(row[g])
                out[n, g, g] = np.diag(p) - np.outer(p, p)
    return out


def metric_bound(policy, mu):
    """What M is added up from: diag(p) + p p^T, where M itself may nearly cancel."""
    M = dense_metric(policy, mu)
    if policy.head == "gaussian":
        return M
    p = np.concatenate([scipy.special.softmax(mu[:, g], axis=1) for g in groups(policy)], axis=1)
    return np.abs(M) + 2 * p[:, :, None] * (np.eye(p.shape[1]) + p[:, None, :])


def dense_fisher(policy, theta, obs):
    """F (P, P) = mean_n J_n^T M_n J_n."""
    J, M = dense_jacobian(policy, theta, obs), dense_metric(policy, dense_forward(policy, theta, obs))
    return np.einsum("nap,nab,nbq->pq", J, M, J, optimize=True) / len(obs)


def size_of(policy, theta, obs, v=None):
    """Bounds on |pre-activations| and, along v, on |J v|, with every slope replaced by its bound 1."""
    weights, _ = layers(policy, np.abs(theta))
    moves, _ = layers(policy, np.abs(theta if v is None else v))
    h, dh, largest = np.abs(obs), np.zeros_like(obs), 1.0
    for (W, b), (dW, db) in zip(weights, moves, strict=True):
        dh = dh @ W + h @ dW + db
        h = h @ W + b
        largest = max(largest, h.max())
        h = np.minimum(h, 1.0)
    return largest, dh


def tolerance(case, bound):
    """eps x the roundings on the way x what a rounding of a pre-activation can do to a slope x what is added up."""
    largest, _ = size_of(case.policy, case.theta, case.obs)
    return 16 * EPS * (sum(case.policy.sizes) + len(case.obs)) * (1 + largest) * (bound + np.finfo(float).tiny)


def bound_fvp(case, v):
    """A bound on the entries of mean_n |J|^T |M| |J| |v|: the sum over all parameters of its parts."""
    unit = size_of(case.policy, case.theta, case.obs, np.ones_like(case.theta))[1]
    Jv = size_of(case.policy, case.theta, case.obs, v)[1]
    M = metric_bound(case.policy, tm.forward(case.policy, case.theta, case.obs))
    tail = np.abs(v[-case.policy.sizes[-1] :]).max() if case.policy.head == "gaussian" else 0.0
    n_out = case.policy.sizes[-1]
    return np.einsum("na,nab,nb->n", unit, M[:, :n_out, :n_out], Jv).mean() + 2 * tail


@st.composite
def cases(draw, heads=("gaussian", "categorical"), max_rows=150, scales=(0.3, 1.0, 30.0), wide=20):
    """Depths 0 to 3, widths 1 to 20, one row to more than a block of them, saturated units, extreme heads."""
    head = draw(st.sampled_from(heads))
    if head == "gaussian":
        nvec, outputs = (), draw(st.integers(1, 4))
    elif head == "categorical":
        nvec = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
        outputs = sum(nvec)
    else:
        nvec, outputs = (), 1
    hidden = draw(st.lists(st.integers(1, wide), max_size=3))
    policy = tm.Policy((draw(st.integers(1, 6)), *hidden, outputs), head, nvec)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    theta = tm.init_params(policy, rng) + draw(st.sampled_from(scales)) * rng.normal(size=tm.n_params(policy))
    weights, log_std = layers(policy, theta)
    spread = draw(st.sampled_from([0.0, 1.0, 50.0]))
    if head == "gaussian":
        log_std[:] = rng.uniform(-10, 3, size=outputs) if spread else 0.0
    else:
        weights[-1][1][:] = rng.uniform(-spread, spread, size=outputs)
        weights[-1][0][:] *= 0.1
    n_rows = draw(st.one_of(st.just(1), st.integers(1, max_rows)))
    return Case(policy, theta, rng.normal(size=(n_rows, policy.sizes[0])), rng)


def gentle(**options):
    """Cases whose third derivatives are tame enough for finite differences."""
    return cases(scales=(0.1, 0.5), max_rows=20, wide=6, **options)


def mild(case):
    """The same network with a head near the middle of its range."""
    weights, log_std = layers(case.policy, case.theta)
    log_std[:] = np.clip(log_std, -1.0, 1.0)
    weights[-1][1][:] = np.clip(weights[-1][1], -2.0, 2.0)
    return case


def make_batch(case, adv=None):
    mu = tm.forward(case.policy, case.theta, case.obs)
    adv = case.rng.normal(size=len(case.obs)) if adv is None else adv
    return tm.Batch(case.obs, tm.sample(case.policy, mu, case.rng), adv, mu)


def all_actions(policy):
    """Every joint action of a product of categoricals (B, groups)."""
    return np.stack([a.ravel() for a in np.meshgrid(*map(np.arange, policy.nvec), indexing="ij")], axis=1)


def slow_kl(policy, mu_old, mu_new):
    """KL(old || new), row by row, from other formulas: scipy's for categoricals, the textbook's in long double."""
    out = []
    for old, new in zip(mu_old.astype(np.longdouble), mu_new.astype(np.longdouble), strict=True):
        if policy.head == "gaussian":
            A = len(old) // 2
            var_old, var_new = np.exp(2 * old[A:]), np.exp(2 * new[A:])
            terms = new[A:] - old[A:] + (var_old + (old[:A] - new[:A]) ** 2) / (2 * var_new) - 0.5
            out.append(terms.sum())
        else:
            total = np.longdouble(0)
            for g in groups(policy):
                log_p = old[g] - old[g].max() - np.log(np.exp(old[g] - old[g].max()).sum())
                log_q = new[g] - new[g].max() - np.log(np.exp(new[g] - new[g].max()).sum())
                total += (np.exp(log_p) * (log_p - log_q)).sum()
            out.append(total)
    return np.array(out, dtype=np.float64)


def random_mu(policy, rng, n, spread=1.0):
    if policy.head == "gaussian":
        A = policy.sizes[-1]
        return np.concatenate([rng.normal(size=(n, A)), rng.uniform(-10, 3, (n, A)) * min(spread, 1.0)], axis=1)
    return rng.uniform(-50, 50, size=(n, policy.sizes[-1])) * spread


heads = st.one_of(
    st.integers(1, 4).map(lambda A: tm.Policy((1, A), "gaussian")),
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda n: tm.Policy((1, sum(n)), "categorical", tuple(n))),
)
seeds = st.integers(0, 2**32)


# ======================================================================================================= the network
@given(cases())
def test_forward_is_the_network_written_out(case):
    largest, _ = size_of(case.policy, case.theta, case.obs)
    expected = dense_forward(case.policy, case.theta, case.obs)
    assert np.abs(tm.forward(*case[:3]) - expected).max() <= tolerance(case, largest)


@given(cases())
def test_the_first_parameters_are_orthogonal_and_those_of_the_last_layer_small(case):
    weights, log_std = layers(case.policy, tm.init_params(case.policy, case.rng))
    for i, (W, b) in enumerate(weights):
        scale = 0.01 if i == len(weights) - 1 else 1.0
        assert allclose(np.linalg.svd(W, compute_uv=False), scale, rtol=100 * EPS * max(W.shape))
        assert (b == 0).all()
    assert allclose(np.exp(log_std), min(1.0, 2.4 / case.policy.sizes[-1]), rtol=4 * EPS)


def test_the_first_weights_are_uniform_over_the_orthogonal_matrices():
    """Then each entry of an n x n one has mean 0 and variance 1 / n; LAPACK's own q has a diagonal of one sign."""
    policy, rng, n, repeats = tm.Policy((4, 4, 1), "value"), np.random.default_rng(0), 4, 400
    draws = np.array([layers(policy, tm.init_params(policy, rng))[0][0][0] for _ in range(repeats)])
    assert (np.abs(draws.mean(axis=0)) < 5 / np.sqrt(n * repeats)).all()


def test_the_first_deviations_add_up_to_init_std_with_none_above_one():
    policy = tm.make_policy(spaces.Box(-1, 1, (3,)), spaces.Box(-5, 20, (5,)), (4,))
    for init_std, sigma in ((1.5, 0.3), (2.5, 0.5), (50.0, 1.0)):
        state = tm.init_state("", policy, tm.Config(hidden=(4,), init_std=init_std), seed=0)
        assert allclose(np.exp(layers(policy, state.theta)[1]), sigma, rtol=4 * EPS)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e5), st.floats(-3, 3))
def test_actions_count_in_halves_of_their_range_from_its_middle_and_as_they_are_without_one(low, width, action):
    lows, highs = (low, -np.inf, low, -np.inf, -3.4e38), (low + width, np.inf, np.inf, low, 3.4e38)
    box = spaces.Box(np.array(lows), np.array(highs), dtype=np.float64)
    policy = tm.make_policy(spaces.Box(-1, 1, (3,)), box, (4,))
    sent = tm._env_actions(policy, np.full((2, 5), action))[0]
    assert isclose(sent[0], np.interp(action, [-1, 1], [low, low + width]), rtol=0, atol=8 * EPS * (abs(low) + width))
    assert (sent[1:] == [action, max(action, low), min(action, low), action]).all()


def test_ranges_whose_half_is_below_a_million_are_scaled_to_and_wider_ones_not():
    box = spaces.Box(np.array([-999_999.0, -1e6]), np.array([999_999.0, 1e6]), dtype=np.float64)
    policy = tm.make_policy(spaces.Box(-1, 1, (3,)), box, (4,))
    assert (tm._env_actions(policy, np.full((1, 2), 0.5)) == [0.5 * 999_999, 0.5]).all()


def test_whole_actions_are_the_nearest_to_those_asked_for():
    policy = tm.make_policy(spaces.Box(-1, 1, (3,)), spaces.Box(-10, 10, (4,), np.int32), (4,))
    sent = tm._env_actions(policy, np.array([[-0.26, 0.14, 0.16, 3.0]]))[0]
    assert sent.dtype == np.int32 and sent.tolist() == [-3, 1, 2, 10]


def test_tanh_has_six_eps_of_relative_error_or_eight_near_the_least_normal_number_and_is_odd_and_passes_nan_on():
    x = np.concatenate([np.logspace(-307.6, 2.5, 20001), np.linspace(0, 25, 20001), [np.inf]])[None]
    ours, exact = x.copy(), np.tanh(x.astype(np.longdouble))
    tm._tanh_inplace(ours)
    assert (np.abs(ours - exact) <= np.where(x < 1e-300, 8, 6) * EPS * exact).all()
    minus = -x
    tm._tanh_inplace(minus)
    assert (minus == -ours).all()
    nan = np.array([[np.nan]])
    tm._tanh_inplace(nan)
    assert np.isnan(nan).all()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_tanh_stays_within_one_and_is_one_where_it_saturates_so_that_huge_observations_have_no_slope(dtype):
    x = np.concatenate([np.linspace(5, 20, 1_000_001), np.logspace(1.31, 38, 1001)]).astype(dtype)[None]
    h = x.copy()
    tm._tanh_inplace(h)
    assert h.max() == 1
    assert (h[x >= 20] == 1).all()
    grad = tm.vjp(tm.Policy((1, 1, 1), "value"), np.array([1, 0, 1, 0], dtype), [[25e18]], [[1.0]])
    assert (grad[:2] == 0).all()


@given(cases(max_rows=20, wide=6))
def test_jvp_is_the_jacobian_times_v(case):
    v = case.rng.normal(size=case.theta.shape)
    _, bound = size_of(case.policy, case.theta, case.obs, v)
    expected = dense_jacobian(*case[:3]) @ v
    tail = np.abs(v).max() if case.policy.head == "gaussian" else 0.0
    assert np.abs(tm.jvp(*case[:3], v) - expected).max() <= tolerance(case, bound.max() + tail)


@given(cases())
def test_vjp_is_the_adjoint_of_jvp(case):
    v = case.rng.normal(size=case.theta.shape)
    u = case.rng.normal(size=(len(case.obs), tm.n_outputs(case.policy)))
    left, right = (tm.jvp(*case[:3], v) * u).sum(), tm.vjp(*case[:3], u) @ v
    _, bound = size_of(case.policy, case.theta, case.obs, v)
    n_out = case.policy.sizes[-1]
    absolute = (bound * np.abs(u[:, :n_out])).sum() + np.abs(u).sum() * np.abs(v).max()
    assert abs(left - right) <= tolerance(case, absolute)


@given(gentle())
def test_jvp_is_the_directional_derivative(case):
    v = case.rng.normal(size=case.theta.shape)
    v /= np.linalg.norm(v)
    h = 1e-5
    difference = (
        tm.forward(case.policy, case.theta + h * v, case.obs) - tm.forward(case.policy, case.theta - h * v, case.obs)
    ) / (2 * h)
    scale = 1 + np.abs(tm.forward(*case[:3])).max() + np.abs(difference).max() * (1 + np.abs(case.obs).max()) ** 2
    # truncation h^2 / 6 times a third derivative, rounding eps / h times a value; both about 1e-10 here
    assert np.abs(tm.jvp(*case[:3], v) - difference).max() <= 100 * scale * (h * h + EPS / h)


# ===================================================================================================== E4: F and F v
@given(cases(max_rows=20, wide=6))
def test_fvp_is_the_dense_sum_of_jacobian_metric_jacobian_times_v(case):
    v = case.rng.normal(size=case.theta.shape)
    error = np.abs(tm.fvp(*case[:3], v) - dense_fisher(*case[:3]) @ v).max()
    assert error <= tolerance(case, bound_fvp(case, np.abs(v)))


@given(cases(wide=6))
def test_fvp_is_the_same_where_the_derivatives_of_the_outputs_are_kept(case):
    v = case.rng.normal(size=case.theta.shape)
    acts = tm._activations(case.theta, np.array(case.policy.sizes), case.obs)
    sizes, acts, m, nvec = tm._fisher(case.policy, acts, tm._outputs(case.policy, case.theta, acts))
    jac = tm._jac(case.theta, sizes, acts, sizes[-1] + 1)
    assert jac.size == (len(case.obs) * sizes[-1] * sum(sizes[1:-2]) if sizes[-1] < 5 else 0)
    assert tm._jac(case.theta, sizes, acts, sizes[-1]).size == 0
    Fv = tm._fvp(case.theta, v, sizes, acts, jac, m, nvec, 0.0)
    error = np.abs(Fv - dense_fisher(*case[:3]) @ v).max()
    assert error <= tolerance(case, bound_fvp(case, np.abs(v)))


@pytest.mark.parametrize(("K", "layers", "kept"), [(3, 3, True), (3, 4, False), (1, 9, True), (1, 10, False)])
def test_the_derivatives_of_the_outputs_are_kept_up_to_eight_rows_for_each_row(K, layers, kept):
    policy, obs = tm.Policy((2, *[3] * layers, K), "gaussian"), np.ones((5, 2))
    sizes, theta = np.array(policy.sizes), tm.init_params(policy, np.random.default_rng(0))
    assert (tm._jac(theta, sizes, tm._activations(theta, sizes, obs), 10).size > 0) == kept


@given(st.sampled_from([65, 128, 700]), seeds)
def test_fvp_is_right_when_rows_times_outputs_exceed_the_parameters(n_rows, seed):
    rng = np.random.default_rng(seed)
    policy = tm.Policy((2, 3, 2), "gaussian")
    theta = tm.init_params(policy, rng) + rng.normal(size=tm.n_params(policy))
    case = Case(policy, theta, rng.normal(size=(n_rows, 2)), rng)
    v = rng.normal(size=theta.shape)
    assert n_rows * 4 > len(theta)
    error = np.abs(tm.fvp(*case[:3], v) - dense_fisher(*case[:3]) @ v).max()
    assert error <= tolerance(case, bound_fvp(case, np.abs(v)))


@pytest.mark.parametrize(("sizes", "n_rows"), [((3, 4, 1), 12_481), ((8, 512, 512, 1), 600)])
def test_products_of_more_rows_or_parameters_than_there_are_sums_for_are_those_of_all_their_rows(sizes, n_rows):
    rng, policy = np.random.default_rng(0), tm.Policy(sizes, "gaussian")
    case = Case(policy, tm.init_params(policy, rng), rng.normal(size=(n_rows, sizes[0])), rng)
    u, v = rng.normal(size=(n_rows, 2)), rng.normal(size=len(case.theta))
    assert min(64, n_rows * sum(sizes) // len(v)) < n_rows / tm.BLOCK
    parts = [slice(i, i + 150) for i in range(0, n_rows, 150)]  # less than a block each
    by_parts = sum(tm.vjp(policy, case.theta, case.obs[part], u[part]) for part in parts)
    unit = size_of(policy, case.theta, case.obs, np.ones_like(v))[1]
    error = np.abs(tm.vjp(policy, case.theta, case.obs, u) - by_parts).max()
    assert error <= tolerance(case, (unit * np.abs(u[:, :1])).sum() + np.abs(u).sum())
    by_parts = sum(tm.fvp(policy, case.theta, case.obs[part], v) * len(u[part]) for part in parts) / n_rows
    assert np.abs(tm.fvp(*case[:3], v) - by_parts).max() <= tolerance(case, bound_fvp(case, np.abs(v)))


@given(cases())
def test_fisher_is_symmetric_and_positive_semidefinite(case):
    u, v = case.rng.normal(size=(2, len(case.theta)))
    Fu, Fv = tm.fvp(*case[:3], u), tm.fvp(*case[:3], v)
    u_bound, v_bound = (np.abs(w).sum() * bound_fvp(case, np.abs(z)) for w, z in ((v, u), (v, v)))
    assert abs(v @ Fu - u @ Fv) <= tolerance(case, u_bound + np.abs(u).sum() * bound_fvp(case, np.abs(v)))
    assert v @ Fv >= -tolerance(case, v_bound)


@given(cases(), st.floats(-10, 10))
def test_fvp_is_linear_in_v(case, a):
    u, v = case.rng.normal(size=(2, len(case.theta)))
    error = tm.fvp(*case[:3], a * u + v) - (a * tm.fvp(*case[:3], u) + tm.fvp(*case[:3], v))
    assert np.abs(error).max() <= tolerance(case, bound_fvp(case, abs(a) * np.abs(u) + np.abs(v)))


@given(cases())
def test_fvp_of_the_same_arguments_is_the_same_bits(case):
    v = case.rng.normal(size=case.theta.shape)
    assert (tm.fvp(*case[:3], v) == tm.fvp(*case[:3], v)).all()


@given(cases(), st.floats(0, 10))
def test_damping_adds_exactly_c_v(case, c):
    v = case.rng.normal(size=case.theta.shape)
    undamped = tm.fvp(*case[:3], v)
    assert (tm.fvp(*case[:3], v, damping=c) == undamped + c * v).all()


@given(gentle())
def test_fvp_is_the_derivative_of_the_gradient_of_mean_kl(case):
    case = mild(case)
    v = case.rng.normal(size=case.theta.shape)
    v /= np.linalg.norm(v)
    mu_old, n = dense_forward(*case[:3]), len(case.obs)

    def kl_grad(theta):
        """grad of D(old, theta), by complex steps through the textbook formulas."""
        J, mu = dense_jacobian(case.policy, theta, case.obs), dense_forward(case.policy, theta, case.obs)
        if case.policy.head == "gaussian":
            A = case.policy.sizes[-1]
            var_old, var = np.exp(2 * mu_old[:, A:]), np.exp(2 * mu[:, A:])
            shift = mu[:, :A] - mu_old[:, :A]
            d_mu = np.concatenate([shift / var, 1 - (var_old + shift**2) / var], axis=1)
        else:
            d_mu = np.concatenate(
                [
                    scipy.special.softmax(mu[:, g], 1) - scipy.special.softmax(mu_old[:, g], 1)
                    for g in groups(case.policy)
                ],
                axis=1,
            )
        return np.einsum("nk,nkp->p", d_mu, J) / n

    h = 1e-5
    difference = (kl_grad(case.theta + h * v) - kl_grad(case.theta - h * v)) / (2 * h)
    Fv = tm.fvp(*case[:3], v)
    scale = 1 + bound_fvp(case, np.abs(v)) * (1 + np.abs(case.obs).max()) ** 2 * np.exp(2)
    assert np.abs(Fv - difference).max() <= 100 * scale * (h * h + EPS / h)


@given(cases(heads=("categorical",), max_rows=10, wide=5))
def test_fisher_is_the_covariance_of_the_score_of_a_categorical(case):
    mu, J = dense_forward(*case[:3]), dense_jacobian(*case[:3])
    F = np.zeros((len(case.theta),) * 2)
    for a in all_actions(case.policy):
        log_p, score_mu = np.zeros(len(mu)), np.zeros_like(mu)
        for g, choice in zip(groups(case.policy), a, strict=True):
            p = scipy.special.softmax(mu[:, g], axis=1)
            log_p += scipy.special.log_softmax(mu[:, g], axis=1)[:, choice]
            score_mu[:, g] = np.eye(p.shape[1])[choice] - p
        scores = np.einsum("nk,nkp->np", score_mu, J)
        F += np.einsum("n,np,nq->pq", np.exp(log_p), scores, scores) / len(mu)
    v = case.rng.normal(size=case.theta.shape)
    size = np.abs(v).sum() * np.abs(J).max() ** 2 * len(v)
    assert np.abs(tm.fvp(*case[:3], v) - F @ v).max() <= tolerance(case, bound_fvp(case, np.abs(v)) + size)


@given(cases(heads=("gaussian",), max_rows=10, wide=5))
def test_fisher_is_the_covariance_of_the_score_of_a_gaussian(case):
    mu, J = dense_forward(*case[:3]), dense_jacobian(*case[:3])
    A = case.policy.sizes[-1]
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)  # exact to degree 9; the score's square has degree 4
    z = np.stack([a.ravel() for a in np.meshgrid(*[nodes] * A)], axis=1)
    w = np.prod(np.stack([a.ravel() for a in np.meshgrid(*[weights] * A)]), axis=0) / np.sqrt(2 * np.pi) ** A
    F = np.zeros((len(case.theta),) * 2)
    for row, jacobian in zip(mu, J, strict=True):
        sigma = np.exp(row[A:])
        scores = np.concatenate([z / sigma, z * z - 1], axis=1) @ jacobian
        F += (scores.T * w) @ scores / len(mu)
    v = case.rng.normal(size=case.theta.shape)
    bound = bound_fvp(case, np.abs(v)) + np.abs(F) @ np.abs(v)
    assert (np.abs(tm.fvp(*case[:3], v) - F @ v) <= 100 * tolerance(case, bound.max())).all()


@given(cases(heads=("gaussian",)))
def test_the_log_std_block_of_fisher_is_two_times_identity_and_coupled_to_nothing(case):
    A = case.policy.sizes[-1]
    v = np.zeros_like(case.theta)
    v[-A:] = case.rng.normal(size=A)
    Fv = tm.fvp(*case[:3], v)
    assert (Fv[:-A] == 0).all()
    assert (Fv[-A:] == 2 * v[-A:]).all()


@given(gentle())
def test_the_quadratic_model_matches_mean_kl_to_third_order(case):
    case = mild(case)
    d = case.rng.normal(size=case.theta.shape)
    d /= np.linalg.norm(d) * (1 + np.abs(case.obs).max())
    mu_old = tm.forward(*case[:3])
    half_quadratic = 0.5 * d @ tm.fvp(*case[:3], d)

    def remainder(t):
        mu = tm.forward(case.policy, case.theta + t * d, case.obs)
        return abs(tm.kl(case.policy, mu_old, mu).mean() - t * t * half_quadratic)

    constant = remainder(0.1) / 0.1**3 + half_quadratic
    for t in (0.03, 0.01, 0.003):
        assert remainder(t) <= 10 * constant * t**3 + 100 * EPS * t


@given(cases())
def test_kl_at_old_is_zero_with_zero_gradient_and_still_has_a_hessian(case):
    mu = tm.forward(*case[:3])
    assert (np.abs(tm.kl(case.policy, mu, mu)) <= 1e-12).all()
    # the gradient in mu: of a categorical p - p, of a Gaussian 0 and 1 - 1; measured as a slope both ways
    k = case.rng.integers(mu.shape[1])
    step = np.zeros_like(mu)
    step[:, k] = (
        1e-6 * np.exp(mu[:, mu.shape[1] // 2 + k]) if case.policy.head == "gaussian" and k < mu.shape[1] // 2 else 1e-6
    )
    ahead, behind = tm.kl(case.policy, mu, mu + step), tm.kl(case.policy, mu, mu - step)
    assert (np.maximum(ahead, behind) <= 2e-12 * (1 + 1e6 * np.spacing(np.abs(mu)).max())).all()


# ============================================================================================== E5: conjugate gradients
def spd(rng, n, log_condition):
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return (Q * np.logspace(0, -log_condition, n)) @ Q.T


@given(seeds, st.integers(1, 30), st.floats(0, 6))
def test_cg_matches_a_direct_solver_to_the_condition_number(seed, n, log_condition):
    rng = np.random.default_rng(seed)
    A, b = spd(rng, n, log_condition), rng.normal(size=n)
    result = tm.cg(lambda p: A @ p, b, max_iter=50 * n, tol=1e-12)
    exact = np.linalg.solve(A, b)
    # |x - exact| <= |A^-1| |residual|; what is left of the residual is tol |b|, and rounding of A x, |A| = 1
    residual = 1e-12 * np.linalg.norm(b) + 50 * n * EPS * np.linalg.norm(exact)
    assert np.linalg.norm(result.x - exact) <= 10 * 10.0**log_condition * residual


@given(seeds, st.integers(1, 8), st.floats(0, 2))
def test_cg_ends_within_n_iterations(seed, n, log_condition):
    rng = np.random.default_rng(seed)
    A, b = spd(rng, n, log_condition), rng.normal(size=n)
    x = tm.cg(lambda p: A @ p, b, max_iter=n, tol=0.0).x  # exact arithmetic would end at the solution
    # of the 16 digits rounding takes two, those of the condition number, in each of some iterations, but not half
    assert np.linalg.norm(b - A @ x) <= 1e-8 * 10.0**log_condition * np.linalg.norm(b)


@given(seeds, st.integers(1, 20), st.integers(0, 6))
def test_preconditioned_cg_is_plain_cg_in_the_coordinates_of_the_preconditioner(seed, n, max_iter):
    rng = np.random.default_rng(seed)
    A, C, b = spd(rng, n, 1), spd(rng, n, 1), rng.normal(size=n)  # x = C y, and C A C y = C b
    x = tm.cg(lambda p: A @ p, b, max_iter, 0.0, precondition=lambda r: C @ (C @ r)).x
    y = tm.cg(lambda p: C @ A @ C @ p, C @ b, max_iter, 0.0).x
    # CG can amplify rounding, up to the condition number, 1e3, in each iteration: compare what they minimise
    energy = [each @ A @ each / 2 - b @ each for each in (x, C @ y)]
    assert isclose(*energy, rtol=1e-9, atol=1e-12 * b @ b)


@given(seeds, st.integers(1, 30), st.floats(0, 6))
def test_cg_preconditioned_by_the_inverse_takes_one_iteration(seed, n, log_condition):
    rng = np.random.default_rng(seed)
    A, b = spd(rng, n, log_condition), rng.normal(size=n)
    result = tm.cg(lambda p: A @ p, b, precondition=lambda r: np.linalg.solve(A, r), tol=1e-3)
    assert (result.n_iter, result.status) == (1, "converged")
    assert np.linalg.norm(result.x - np.linalg.solve(A, b)) <= 100 * n * EPS * 10**log_condition * np.linalg.norm(
        result.x
    )


@given(seeds, st.integers(1, 30))
def test_cg_ends_at_a_preconditioner_that_is_not_positive_with_a_status(seed, n):
    b = np.random.default_rng(seed).normal(size=n)
    result = tm.cg(lambda p: p, b, precondition=lambda r: -r)
    assert (result.status, result.n_iter) == ("negative curvature", 0) and (result.x == 0).all()


def dense_preconditioner(case, damping, r):
    """Of a value function, whose M is 1."""
    policy, theta, n = case.policy, case.theta, len(case.obs)
    step = 1 if n < 128 else 2 if n < 192 else 3 if n < 256 else 4
    obs = case.obs[[min(k * step + k % step, n - 1) for k in range(-(-n // step))]]
    J, h, at, parts = dense_jacobian(policy, theta, obs), obs, 0, []
    for W, b in layers(policy, theta)[0]:
        m, n = W.shape
        G = J[:, 0, at + m * n : at + m * n + n]  # the derivative by b is that by what goes into the tanh
        h = np.c_[h, np.ones(len(h))]
        A, S = h.T @ h / len(h), G.T @ G / len(obs)
        a, s = np.trace(A) / len(A), max(np.trace(S) / len(S), 1e-30)
        A, S = (each if len(each) <= 513 else np.eye(len(each)) * np.trace(each) / len(each) for each in (A, S))
        damped = np.sqrt(max(damping, 1e-6 * a * s))
        A, S = A + damped * np.sqrt(a / s) * np.eye(len(A)), S + damped * np.sqrt(s / a) * np.eye(len(S))
        R = r[at : at + m * n + n].reshape(m + 1, n)
        parts.append(np.linalg.solve(A, np.linalg.solve(S, R.T).T).ravel())
        at, h = at + m * n + n, np.tanh(h[:, :-1] @ W + b)
    return np.concatenate(parts)


@given(cases(heads=("value",), scales=(0.3, 1.0), wide=6, max_rows=300), st.floats(1e-3, 1))
def test_the_preconditioner_is_the_inverse_of_the_kronecker_products_of_some_rows(case, damping):
    r = case.rng.normal(size=case.theta.shape)
    expected = dense_preconditioner(case, damping, r)
    # A and S are of the order of 1, and 1e-3 at least with their damping
    assert np.linalg.norm(preconditioner(case, damping)(r) - expected) <= 1e-9 * np.linalg.norm(expected)


@given(cases(heads=("gaussian", "categorical", "value"), scales=(0.3, 1.0), wide=6, max_rows=300))
def test_the_preconditioner_of_float32_is_that_of_float64_and_takes_vectors_of_both(case):
    low = case._replace(theta=case.theta.astype(np.float32), obs=case.obs.astype(np.float32))
    r = case.rng.normal(size=case.theta.shape)
    expected = preconditioner(low._replace(theta=low.theta.astype(float), obs=low.obs.astype(float)), 0.1)(r)
    for each in (r, r.astype(np.float32)):
        found = preconditioner(low, 0.1)(each)
        # damped by 0.1 (a / s)^0.5 and more, neither factor is of a condition above some hundreds
        assert found.dtype == each.dtype and np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("sizes", [(512, 3, 1), (513, 3, 1), (3, 513, 1), (3, 514, 1)])
def test_a_factor_of_more_than_513_columns_is_its_mean_eigenvalue(sizes):
    rng, policy = np.random.default_rng(0), tm.Policy(sizes, "value")
    case = Case(policy, tm.init_params(policy, rng), rng.normal(size=(20, sizes[0])), rng)
    case.theta[:] += 0.1 * rng.normal(size=case.theta.shape)
    r = rng.normal(size=case.theta.shape)
    expected = dense_preconditioner(case, 0.1, r)
    assert np.linalg.norm(preconditioner(case, 0.1)(r) - expected) <= 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize(("head", "nvec", "K"), [("gaussian", (), 3), ("categorical", (2, 3), 5)])
def test_the_mean_of_the_random_factors_is_the_metric_between_the_derivatives_of_the_outputs(head, nvec, K):
    rng = np.random.default_rng(0)
    policy = tm.Policy((2, 4, 3, K), head, nvec)
    theta, state = 0.7 * rng.normal(size=tm.n_params(policy)), rng.normal(size=(1, 2))
    J, M = dense_jacobian(policy, theta, state)[0, :K], dense_metric(policy, dense_forward(policy, theta, state))[0]
    sizes, acts, m, nvec = fisher_of(Case(policy, theta, np.repeat(state, 400_000, axis=0), rng))
    at = 0
    for (W, b), (_, S) in zip(
        layers(policy, theta)[0], reversed([*tm._kronecker_factors(theta, sizes, acts, m, nvec)]), strict=True
    ):
        G, at = J[:, at + W.size : at + W.size + b.size], at + W.size + b.size
        expected = G.T @ M[:K, :K] @ G
        # the mean of 100,000 draws, of each of which the square is at most K^2 times the mean
        assert np.abs(np.triu(S - expected)).max() <= 6 * K / 100_000**0.5 * np.abs(np.diag(expected)).max()


def fisher_of(case):
    acts = tm._activations(case.theta, np.array(case.policy.sizes), case.obs)
    return tm._fisher(case.policy, acts, tm._outputs(case.policy, case.theta, acts))


@np.errstate(all="ignore")  # NumPy's word on what overflows, where nothing is compiled
@pytest.mark.parametrize(("dtype", "huge"), [(np.float32, 1e25), (np.float64, 1e160)])
def test_where_the_factors_overflow_a_solve_goes_on_without_them(dtype, huge):
    case = fixed_case("gaussian")
    case.obs[7, 1] = huge
    case = case._replace(theta=case.theta.astype(dtype), obs=case.obs.astype(dtype))
    batch = make_batch(case, case.rng.normal(size=len(case.obs)).astype(dtype))
    infos = [tm.trpo_update(case.policy, case.theta, batch, tm.Config(precondition=each))[1] for each in (True, False)]
    assert all(info.accepted for info in infos)


def test_a_damping_that_numpy_made_gives_the_same_update_in_float32():
    case = fixed_case("gaussian")
    case = case._replace(theta=case.theta.astype(np.float32), obs=case.obs.astype(np.float32))
    batch = make_batch(case, case.rng.normal(size=len(case.obs)).astype(np.float32))
    python, numpy = (
        tm.trpo_update(case.policy, case.theta, batch, tm.Config(damping=c)) for c in (0.1, np.float64(0.1))
    )
    assert np.array_equal(python[0], numpy[0])


def test_many_outputs_cost_a_solve_no_more_memory_than_its_activations():
    rng, policy = np.random.default_rng(0), tm.Policy((3, 8, 1000), "categorical", (1000,))
    case = Case(policy, tm.init_params(policy, rng), rng.normal(size=(1000, 3)), rng)
    fisher = fisher_of(case)
    tracemalloc.start()
    tm._preconditioner(case.theta, *fisher, 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 5 * fisher[1].nbytes


def preconditioner(case, damping):
    return tm._preconditioner(case.theta, *fisher_of(case), damping)


@given(cases(heads=("gaussian", "categorical", "value"), wide=6), st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_preconditioner_is_symmetric_and_positive_definite_whatever_the_network(case, damping):
    P = np.array([preconditioner(case, damping)(unit) for unit in np.eye(len(case.theta))])
    scale = np.sqrt(np.outer(P.diagonal(), P.diagonal()))
    assert (P.diagonal() > 0).all() and (np.abs(P - P.T) <= 1e-6 * scale).all()
    assert np.linalg.eigvalsh((P + P.T) / 2 / scale).min() > -1e-6


@given(cases(heads=("gaussian",), wide=6), st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_preconditioner_is_the_inverse_of_f_in_log_std(case, damping):
    v = np.zeros_like(case.theta)
    v[-case.policy.sizes[-1] :] = case.rng.normal(size=case.policy.sizes[-1])
    assert allclose(preconditioner(case, damping)(tm.fvp(*case[:3], v, damping)), v, rtol=10 * EPS)


@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_the_preconditioner_is_the_inverse_of_f_where_one_layer_is_all_there_is(seed, D, repeats):
    rng = np.random.default_rng(seed)
    value = tm.Policy((D, 1), "value")
    obs = np.repeat(rng.normal(size=(D + 5, D)), 12 * repeats, axis=0)  # so that every second to fourth row is as all
    case = Case(value, rng.normal(size=D + 1), obs, rng)
    v = rng.normal(size=D + 1)
    Fv = tm.fvp(*case[:3], v)
    A = np.c_[obs, np.ones(len(obs))].T @ np.c_[obs, np.ones(len(obs))] / len(obs)
    # but for the least damping, a thousandth of the mean eigenvalue in A and in S = 1
    assert np.linalg.norm(preconditioner(case, 0.0)(Fv) - v) <= 0.01 * np.linalg.cond(A) * np.linalg.norm(v)


@given(seeds, st.integers(2, 30), st.floats(0, 8))
def test_cg_never_raises_its_energy_error(seed, n, log_condition):
    rng = np.random.default_rng(seed)
    A, b = spd(rng, n, log_condition), rng.normal(size=n)
    exact = np.linalg.solve(A, b)
    energies = []
    for k in range(n):
        error = tm.cg(lambda p: A @ p, b, max_iter=k, tol=0.0).x - exact
        energies.append(error @ A @ error)
    floor = (n * EPS) ** 2 * exact @ A @ exact * 10.0 ** (2 * log_condition)
    assert all(later <= earlier * (1 + 1e-9) + floor for earlier, later in pairwise(energies))


@given(seeds, st.integers(1, 30), st.integers(0, 30))
def test_cg_reports_its_true_residual(seed, n, max_iter):
    rng = np.random.default_rng(seed)
    A, b = spd(rng, n, 4), rng.normal(size=n)
    result = tm.cg(lambda p: A @ p, b, max_iter=max_iter, tol=1e-10)
    largest = np.linalg.norm(np.linalg.solve(A, b)) + 1  # no iterate of CG is longer than the solution
    drift = 10 * (result.n_iter + 1) * n * EPS * largest
    assert abs(result.residual_norm - np.linalg.norm(b - A @ result.x)) <= drift
    assert (result.status == "converged") == (result.residual_norm <= 1e-10 * np.linalg.norm(b))


@given(seeds, st.integers(1, 30), st.floats(-300, 300))
def test_cg_leaves_b_as_it_is_and_scales_with_it(seed, n, exponent):
    rng = np.random.default_rng(seed)
    A, b = spd(rng, n, 2), rng.normal(size=n)
    factor = 2.0 ** int(exponent * 3)
    before = b.copy()
    x = tm.cg(lambda p: A @ p, b, max_iter=5).x
    assert (b == before).all()
    scaled = tm.cg(lambda p: A @ p, b * factor, max_iter=5).x
    assert allclose(scaled, x * factor, rtol=1e-12, atol=0)


@given(seeds, st.integers(1, 30))
def test_cg_gives_matvec_vectors_that_it_may_keep_and_change(seed, n):
    rng = np.random.default_rng(seed)
    A, b, kept = spd(rng, n, 2), rng.normal(size=n), []

    def careless(p):
        kept.append(p)
        Ap = A @ p
        p[:] = np.nan
        Ap.flags.writeable = False
        return Ap

    assert (tm.cg(careless, b).x == tm.cg(lambda p: A @ p, b).x).all()
    assert len({p.ctypes.data for p in kept}) == len(kept)
    assert allclose(tm.cg(lambda p: p, b).x, b, rtol=4 * EPS)


def test_cg_takes_no_step_that_its_dtype_cannot_hold():
    result = tm.cg(lambda p: p * np.float32(1e-39), np.ones(12, np.float32))
    assert (result.status, result.n_iter) == ("not finite", 0) and (result.x == 0).all()


def test_cg_of_zero_is_zero_in_no_iterations():
    result = tm.cg(lambda p: 1 / 0, np.zeros(5))
    assert (result.x == 0).all()
    assert result[1:] == (0.0, 0, "converged")


def test_cg_takes_ten_iterations_unless_told_otherwise():
    result = tm.cg(lambda p: np.arange(1.0, 41.0) * p, np.ones(40))
    assert (result.n_iter, result.status) == (10, "iteration limit")


@given(seeds, st.integers(2, 10))
def test_cg_ends_at_negative_curvature_with_a_status_and_no_nan(seed, n):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    A = (Q * np.r_[np.linspace(1, 2, n - 1), -1.0]) @ Q.T
    b = Q[:, -1] + 0.1 * Q[:, 0]
    result = tm.cg(lambda p: A @ p, b, max_iter=2 * n)
    assert result.status == "negative curvature"
    assert np.isfinite(result.x).all()


def test_cg_ends_where_the_curvature_is_zero():
    result = tm.cg(lambda p: 0 * p, np.ones(3))
    assert (result.status, result.n_iter) == ("negative curvature", 0) and (result.x == 0).all()


@given(seeds, st.integers(2, 30), st.floats(0, 4))
def test_cg_on_a_singular_matrix_ends_at_rounding_whatever_the_tolerance(seed, n, log_condition):
    rng = np.random.default_rng(seed)
    A = spd(rng, n, log_condition)
    A[-1] = A[:, -1] = 0
    b = A @ rng.normal(size=n)
    result = tm.cg(lambda p: A @ p, b, max_iter=100 * n, tol=0.0)
    assert result.status == "converged" and result.n_iter < 100 * n
    # |x| <= |A^+| |b| but for rounding, which running on would blow up
    exact = np.linalg.pinv(A, rcond=1e-10) @ b
    assert np.linalg.norm(result.x - exact) <= 100 * n * EPS * 10.0 ** (2 * log_condition) * np.linalg.norm(b)


def test_the_solve_of_an_update_says_whether_it_converged():
    case = fixed_case("gaussian")
    acts = tm._activations(case.theta, np.array(case.policy.sizes), case.obs)
    for max_iter, expected in ((2, tm.ITERATION_LIMIT), (500, tm.CONVERGED)):
        fisher = tm._fisher(case.policy, acts, tm._outputs(case.policy, case.theta, acts))
        config = tm.Config(cg_iters=max_iter, cg_tol=1e-8)
        assert tm._solve(case.theta, np.ones_like(case.theta), *fisher, 0.1, config)[3] == expected


@pytest.mark.parametrize("factor", [np.nan, 1e-310])
def test_cg_ends_at_a_product_or_a_step_that_is_not_finite(factor):
    result = tm.cg(lambda p: p * factor, np.ones(3))
    assert result.status == "not finite"
    assert (result.x == 0).all()


@given(cases(scales=(0.3, 1.0)), st.floats(0.01, 1), st.integers(1, 4), st.booleans())
def test_the_solve_of_an_update_is_cg_over_fvp_and_its_curvature_leaves_the_damping_out(case, damping, max_iter, plain):
    case = mild(case)
    b = case.rng.normal(size=case.theta.shape)
    acts = tm._activations(case.theta, np.array(case.policy.sizes), case.obs)
    fisher = tm._fisher(case.policy, acts, tm._outputs(case.policy, case.theta, acts))
    config = tm.Config(cg_iters=max_iter, cg_tol=1e-10, precondition=not plain)
    x, _, _, _, curvature = tm._solve(case.theta, b, *fisher, damping, config)
    P = None if plain else preconditioner(case, damping)
    result = tm.cg(lambda p: tm.fvp(*case[:3], p, damping), b, max_iter, 1e-10, precondition=P)
    # they scale b differently, and CG can amplify the rounding up to the condition number: compare what they minimise
    energy = [y @ tm.fvp(*case[:3], y, damping) / 2 - b @ y for y in (x, result.x)]
    assert isclose(*energy, rtol=1e-5)
    assert isclose(curvature, x @ tm.fvp(*case[:3], x), rtol=1e-7, atol=1e-9 * abs(b @ x))


def fixed_case(head="categorical", n=60, seed=0):
    rng = np.random.default_rng(seed)
    policy = tm.Policy((3, 8, 4), head, (4,) if head == "categorical" else ())
    return Case(
        policy, tm.init_params(policy, rng) + 0.3 * rng.normal(size=tm.n_params(policy)), rng.normal(size=(n, 3)), rng
    )


def solve_case(case, tol=0.01, factor=1.0, solve=None, cg_iters=10):
    acts = tm._activations(case.theta, np.array(case.policy.sizes), case.obs)
    fisher = tm._fisher(case.policy, acts, tm._outputs(case.policy, case.theta, acts))
    b = np.random.default_rng(0).normal(size=case.theta.shape).astype(case.theta.dtype)
    config = tm.Config(cg_iters=cg_iters, cg_tol=tol)
    return (solve or tm._solve_to_tol)(case.theta, b * factor, *fisher, 0.1, config)


@given(cases(scales=(0.3, 1.0), wide=6))
def test_ten_iterations_to_few_digits_with_products_in_float32_come_as_far_as_seven_in_float64(case):
    case = mild(case)
    x, residual, _, _, curvature = solve_case(case)
    exact = solve_case(case, solve=tm._solve, cg_iters=7)[0]
    b, F = np.random.default_rng(0).normal(size=case.theta.shape), functools.partial(tm.fvp, *case[:3])
    largest = np.linalg.norm([F(unit) for unit in np.eye(len(b))])  # at least the largest eigenvalue
    # F v is off by a few roundings of |F| |v|, ten times, and |x| is at most |b| / damping
    off = 100 * np.finfo(np.float32).eps * (largest + 0.1) * np.linalg.norm(b) / 0.1
    assert abs(np.linalg.norm(b - F(x, 0.1)) - residual) <= off
    assert isclose(curvature, x @ F(x), rtol=1e-5, atol=off * np.linalg.norm(x))
    # what both maximise: rounding delays CG, here by three iterations of ten at most, and one may end at a residual of
    # 0.01 |b|, which is worth |r|^2 / 2 damping
    gained, most = (b @ y - y @ F(y, 0.1) / 2 for y in (x, exact))
    assert gained >= most - off * np.linalg.norm(x) - 0.01**2 * b @ b / 0.2


def in_float32(case):
    return case._replace(theta=case.theta.astype(np.float32), obs=case.obs.astype(np.float32))


def saturated():
    """Logits so far apart that one action has a probability, and F all its elements, of 1e-52."""
    case = fixed_case("categorical")
    case.theta[-4:] = 0, 0, 0, 120
    return case


@pytest.mark.parametrize(
    ("case", "tol", "expected"),
    [
        (fixed_case(), 1e-3, ["float32"]),
        (fixed_case(), 9e-4, ["float64"]),
        (in_float32(fixed_case()), 0.01, ["float32"]),
        (fixed_case()._replace(obs=1e60 * fixed_case().obs), 0.01, ["float32", "float64"]),
        (saturated(), 0.01, ["float32", "float64"]),
    ],
    ids=["few digits", "more", "of float32", "too large for it", "too small"],
)
def test_a_solve_to_few_digits_is_in_float32_where_that_holds_the_numbers(monkeypatch, case, tol, expected):
    dtypes, real = [], tm._solve

    def noted(theta, *args):
        dtypes.append(str(theta.dtype))
        return real(theta, *args)

    monkeypatch.setattr(tm, "_solve", noted)
    with np.errstate(all="ignore"):
        solved = solve_case(case, tol)
        assert dtypes == expected
        if expected[-1] == str(case.theta.dtype):
            assert (solved[0] == solve_case(case, tol, solve=real)[0]).all() and 0 < solved[4] < np.inf


@pytest.mark.parametrize("status", [tm.NEGATIVE_CURVATURE, tm.NOT_FINITE])
def test_float64_decides_where_float32_ends_at_a_bad_direction_after_good_ones(monkeypatch, status):
    def solve(theta, b, *_):
        return b, 0.5, 3, status if theta.dtype == np.float32 else tm.CONVERGED, 1.0

    monkeypatch.setattr(tm, "_solve", solve)
    assert solve_case(fixed_case())[3] == tm.CONVERGED


@pytest.mark.parametrize("exponent", [-400, 400])
def test_a_solve_scales_with_its_right_hand_side_beyond_what_float32_can_hold(exponent):
    x, residual, _, _, curvature = solve_case(fixed_case())
    scaled = solve_case(fixed_case(), factor=2.0**exponent)
    assert (scaled[0] == x * 2.0**exponent).all()
    assert scaled[1] == residual * 2.0**exponent and scaled[4] == curvature * 4.0**exponent


# ======================================================================================================== the heads
@given(heads, seeds, st.integers(1, 5), st.sampled_from([1e-9, 1e-3, 1.0]))
def test_kl_is_an_independent_computation_of_it(policy, seed, n, distance):
    rng = np.random.default_rng(seed)
    old = random_mu(policy, rng, n)
    new = old + distance * (random_mu(policy, rng, n) - old)
    ours, slow = tm.kl(policy, old, new), np.maximum(slow_kl(policy, old, new), 0)
    # the textbook form subtracts terms that nearly cancel; in long double that leaves this much
    cancelled = 200 * np.finfo(np.longdouble).eps * (1 + np.abs(old).max() + np.abs(new).max())
    # our t = log p_new - log p_old carries eps |mu|, and KL ~ t^2 / 2
    t_error = 8 * EPS * (1 + np.abs(old).max())
    if policy.head == "gaussian":
        t_error *= 1 + np.exp(-np.minimum(old, new)[:, policy.sizes[-1] :]).max()
    assert (np.abs(ours - slow) <= 1e-12 * slow + cancelled + 8 * t_error * np.sqrt(slow) + t_error**2).all()


@given(heads, seeds, st.floats(0, 1))
def test_kl_is_not_negative_and_zero_on_itself(policy, seed, spread):
    rng = np.random.default_rng(seed)
    old, new = random_mu(policy, rng, 20, spread), random_mu(policy, rng, 20, spread)
    assert (tm.kl(policy, old, new) >= 0).all()
    assert (tm.kl(policy, old, old) <= 1e-12).all()
    close = old * (1 + 1e-15)
    assert (tm.kl(policy, old, close) >= -EPS).all()


def test_kl_of_a_tiny_change_keeps_its_relative_precision():
    policy, h = tm.Policy((1, 2), "categorical", (2,)), 1e-6
    exact = h**2 / 8 - h**4 / 192  # log cosh(h / 2), of which the next term is below 1e-26 of this
    assert isclose(tm.kl(policy, np.zeros((1, 2)), np.array([[h, 0.0]]))[0], exact, rtol=1e-8)  # eps / h


@pytest.mark.parametrize("rare", [0.3, 0.1, 1e-3, 1e-9])
def test_kl_is_right_where_a_choice_becomes_many_times_as_likely(rare):
    policy, p, q = tm.Policy((1, 2), "categorical", (2,)), np.array([rare, 1 - rare]), np.array([1 - rare, rare])
    by_hand = (1 - 2 * rare) * np.log((1 - rare) / rare)
    assert isclose(tm.kl(policy, np.log(p)[None], np.log(q)[None]), by_hand, rtol=1e-12)


def test_kl_takes_old_first():
    p, q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    policy = tm.Policy((1, 2), "categorical", (2,))
    by_hand = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)  # 0.5108; the other way round it is 0.3681
    assert isclose(tm.kl(policy, np.log(p)[None], np.log(q)[None]), by_hand, rtol=1e-14)
    gaussian = tm.Policy((1, 1), "gaussian")
    old, new = np.array([[0.0, 0.0]]), np.array([[1.0, np.log(2.0)]])
    by_hand = np.log(2) + (1 + 1) / 8 - 0.5  # 0.4431; the other way round it is 1.3069
    assert isclose(tm.kl(gaussian, old, new), by_hand, rtol=1e-14)


def test_kl_survives_logits_and_log_stds_at_the_limits_of_floating_point():
    categorical, gaussian = tm.Policy((1, 2), "categorical", (2,)), tm.Policy((1, 1), "gaussian")
    a, b = np.array([[0.0, -2000.0]]), np.array([[-2000.0, 0.0]])
    assert isclose(tm.kl(categorical, a, b), 2000)
    for log_std in (-30.0, -20.0, 2.0, 10.0):
        mu = np.array([[0.3, log_std]])
        assert tm.kl(gaussian, mu, mu) == 0
        assert np.isfinite(tm.kl(gaussian, mu, mu + 1e-3)).all()


@given(heads, seeds)
def test_log_prob_is_scipys(policy, seed):
    rng = np.random.default_rng(seed)
    mu = random_mu(policy, rng, 6)
    actions = tm.sample(policy, mu, rng)
    if policy.head == "gaussian":
        A = policy.sizes[-1]
        expected = scipy.stats.norm.logpdf(actions, mu[:, :A], np.exp(mu[:, A:])).sum(axis=1)
    else:
        expected = sum(
            scipy.special.log_softmax(mu[:, g], axis=1)[np.arange(6), actions[:, i]]
            for i, g in enumerate(groups(policy))
        )
    assert allclose(tm.log_prob(policy, mu, actions), expected, rtol=1e-12, atol=1e-12 * (1 + np.abs(mu).max()))


@given(heads.filter(lambda p: p.head == "categorical"), seeds)
def test_entropy_is_minus_the_mean_log_prob_of_a_categorical(policy, seed):
    mu = random_mu(policy, np.random.default_rng(seed), 1)
    actions = all_actions(policy)
    log_p = tm.log_prob(policy, np.tile(mu, (len(actions), 1)), actions)
    assert isclose(np.exp(log_p).sum(), 1, rtol=1e-12)
    assert isclose(tm.entropy(policy, mu), -(np.exp(log_p) * log_p).sum(), rtol=1e-12, atol=1e-12)


@given(heads.filter(lambda p: p.head == "gaussian"), seeds)
def test_entropy_is_minus_the_mean_log_prob_of_a_gaussian(policy, seed):
    mu, A = random_mu(policy, np.random.default_rng(seed), 1), policy.sizes[-1]
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # log_prob is quadratic: exact
    total = 0.0
    for i in range(A):
        one = tm.Policy((1, 1), "gaussian")
        mean, log_std = mu[:, i : i + 1], mu[:, A + i : A + i + 1]
        log_p = tm.log_prob(one, np.tile(np.c_[mean, log_std], (3, 1)), mean + np.exp(log_std) * nodes[:, None])
        total -= weights @ log_p / np.sqrt(2 * np.pi)
    assert isclose(tm.entropy(policy, mu), total, rtol=1e-10, atol=1e-10)


def test_score_takes_memory_for_what_it_returns_and_not_for_the_square_of_the_choices():
    policy, rng = tm.Policy((1, 3000), "categorical", (3000,)), np.random.default_rng(0)
    mu = rng.normal(size=(4, 3000))
    actions = tm.sample(policy, mu, rng)
    tracemalloc.start()
    score = tm.score(policy, mu, actions)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 10 * score.nbytes


@given(heads, seeds)
def test_score_is_the_gradient_of_log_prob_and_has_mean_zero(policy, seed):
    rng = np.random.default_rng(seed)
    mu = random_mu(policy, rng, 4, 0.02)
    actions = tm.sample(policy, mu, rng)
    score = tm.score(policy, mu, actions)
    for k in range(mu.shape[1]):
        step = np.zeros_like(mu)
        step[:, k] = 1e-5
        difference = (tm.log_prob(policy, mu + step, actions) - tm.log_prob(policy, mu - step, actions)) / 2e-5
        # third derivatives of log_prob: up to 8 z^2 in log_std
        assert allclose(score[:, k], difference, atol=1e-7 * (1 + np.abs(score).max() ** 2))
    if policy.head == "categorical":
        joint = all_actions(policy)
        log_p = tm.log_prob(policy, np.tile(mu[:1], (len(joint), 1)), joint)
        mean = np.exp(log_p) @ tm.score(policy, np.tile(mu[:1], (len(joint), 1)), joint)
        assert np.abs(mean).max() <= 1e-13 * len(joint)


@given(heads, seeds)
def test_metric_is_the_hessian_of_kl_in_mu(policy, seed):
    rng = np.random.default_rng(seed)
    mu = random_mu(policy, rng, 3, 0.02)
    a, b = rng.normal(size=(2, *mu.shape))
    h = 1e-3
    mixed = sum(
        sign * tm.kl(policy, mu, mu + h * (s * a + r * b))
        for sign, s, r in ((1, 1, 1), (-1, 1, -1), (-1, -1, 1), (1, -1, -1))
    ) / (4 * h * h)
    expected = (a * tm.fisher_metric(policy, mu, b)).sum(axis=1)
    scale = (
        1
        + (np.abs(a) + np.abs(b)).max() ** 4
        * (1 + tm.fisher_metric(policy, mu, np.ones_like(mu)).max())
        * mu.shape[1] ** 2
    )
    assert allclose(mixed, expected, atol=100 * h * h * scale)


@given(heads, seeds)
def test_metric_is_its_dense_form(policy, seed):
    rng = np.random.default_rng(seed)
    mu = random_mu(policy, rng, 5)
    dmu = rng.normal(size=mu.shape)
    expected = np.einsum("nab,nb->na", dense_metric(policy, mu), dmu)
    bound = np.einsum("nab,nb->na", metric_bound(policy, mu), np.abs(dmu))
    # a softmax of logits up to 50 carries 100 eps, and enters twice
    assert (np.abs(tm.fisher_metric(policy, mu, dmu) - expected) <= 400 * EPS * bound).all()


@given(st.integers(2, 5), seeds, st.floats(0, 600))
def test_metric_of_a_nearly_certain_choice_keeps_its_relative_precision(n, seed, certainty):
    """M d = p_k sum_j p_j (d_k - d_j): the form in which nothing cancels."""
    rng = np.random.default_rng(seed)
    policy, d, logits = tm.Policy((1, n), "categorical", (n,)), *rng.normal(size=(2, 3, n))
    logits[np.arange(3), rng.permutation(max(n, 3))[:3] % n] += certainty
    p = scipy.special.softmax(logits, axis=1)
    apart = d[:, :, None] - d[:, None, :]
    expected, spread = (p * (p[:, None, :] * each).sum(axis=2) for each in (apart, np.abs(apart)))
    # logits of some size carry that many eps into p
    assert (np.abs(tm.fisher_metric(policy, logits, d) - expected) <= 20 * (certainty + 5) * EPS * spread).all()


@given(st.integers(2, 6), seeds)
def test_metric_transforms_between_logits_and_probabilities_as_a_metric_does(n, seed):
    rng = np.random.default_rng(seed)
    policy = tm.Policy((1, n), "categorical", (n,))
    logits = rng.normal(size=(1, n))
    p = scipy.special.softmax(logits[0])
    jacobian = np.diag(p) - np.outer(p, p)  # d p / d logits
    in_probabilities = np.diag(1 / p)  # of sum p log(p/q), as q varies
    in_logits = np.stack([tm.fisher_metric(policy, logits, e[None])[0] for e in np.eye(n)])
    assert allclose(in_logits, jacobian.T @ in_probabilities @ jacobian, atol=100 * EPS)


@given(heads.filter(lambda p: p.head == "categorical"), seeds)
def test_frequencies_of_samples_match_the_probabilities(policy, seed):
    rng = np.random.default_rng(seed)
    mu, n = random_mu(policy, rng, 1, 0.03), 4000
    actions = tm.sample(policy, np.tile(mu, (n, 1)), rng)
    for i, g in enumerate(groups(policy)):
        p = scipy.special.softmax(mu[0, g])
        counts = np.bincount(actions[:, i], minlength=len(p))
        chi2 = ((counts - n * p) ** 2 / (n * p)).sum()
        assert chi2 <= scipy.stats.chi2.isf(1e-9, max(len(p) - 1, 1))


@given(seeds)
def test_samples_of_a_gaussian_have_its_mean_and_deviation(seed):
    rng = np.random.default_rng(seed)
    policy, n = tm.Policy((1, 2), "gaussian"), 4000
    mu = random_mu(policy, rng, 1)
    z = (tm.sample(policy, np.tile(mu, (n, 1)), rng) - mu[:, :2]) / np.exp(mu[:, 2:])
    assert (np.abs(z.mean(axis=0)) <= 6.5 / np.sqrt(n)).all()
    assert (np.abs((z * z).mean(axis=0) - 1) <= 6.5 * np.sqrt(2 / n)).all()


@given(heads.filter(lambda p: p.head == "categorical"), seeds, st.sampled_from([np.float64, np.float32]))
def test_the_largest_draw_below_one_still_gives_a_valid_action(policy, seed, dtype):
    mu = random_mu(policy, np.random.default_rng(seed), 30).astype(dtype)
    mu[:10] *= 100  # here most probabilities are exactly 0
    for draw in (0.0, np.nextafter(1.0, 0.0)):
        actions = np.full((30, len(policy.nvec)), -1)
        tm._sample_rows(mu, np.array(policy.nvec), np.full(actions.shape, draw), actions)
        assert ((actions >= 0) & (actions < policy.nvec)).all()
        assert np.isfinite(tm.log_prob(policy, mu, actions)).all()
        assert (tm.log_prob(policy, mu, actions) > -745 * len(policy.nvec)).all()  # of positive probability


@pytest.mark.parametrize("head", ["gaussian", "categorical"])
def test_every_parameter_moves_the_policy_and_has_a_gradient(head):
    rng = np.random.default_rng(0)
    policy = tm.Policy((3, 4, 2), "gaussian") if head == "gaussian" else tm.Policy((3, 4, 5), "categorical", (2, 3))
    theta = tm.init_params(policy, rng) + 0.3 * rng.normal(size=tm.n_params(policy))
    batch = make_batch(Case(policy, theta, rng.normal(size=(50, 3)), rng))
    assert (tm.surrogate_grad(policy, theta, batch) != 0).all()
    for k in range(len(theta)):
        moved = theta.copy()
        moved[k] += 0.1
        assert tm.kl(policy, batch.mu_old, tm.forward(policy, moved, batch.obs)).mean() > 0


# ================================================================================================ E1 to E7: the update
def slow_surrogate(policy, theta, batch):
    mu, ratio = dense_forward(policy, theta, batch.obs), np.empty(len(batch.obs))
    for n, weight in enumerate(np.broadcast_to(batch.weights, len(ratio))):
        log_ratio = 0.0
        for m, sign in ((mu, 1), (batch.mu_old, -1)):
            if policy.head == "gaussian":
                A = policy.sizes[-1]
                log_ratio += sign * scipy.stats.norm.logpdf(batch.actions[n], m[n, :A], np.exp(m[n, A:])).sum()
            else:
                for i, g in enumerate(groups(policy)):
                    log_ratio += sign * scipy.special.log_softmax(m[n, g])[batch.actions[n, i]]
        ratio[n] = weight * np.exp(log_ratio)
    if batch.group == 1:
        return ratio @ batch.adv / len(ratio)
    states = [slice(n, n + batch.group) for n in range(0, len(ratio), batch.group)]
    return sum(ratio[s] @ batch.adv[s] / ratio[s].sum() for s in states) / len(states)


def update_cases():
    return cases(scales=(0.1, 0.5, 1.0), max_rows=100, wide=12)


CONFIG = tm.Config(damping=1e-3, cg_tol=1e-10)


def grouped(case, group):
    """The batch of make_batch with weights, its rows group by group actions of one state, as vine sampling has them."""
    case = case._replace(obs=np.repeat(case.obs, group, axis=0))
    return case, make_batch(case)._replace(weights=case.rng.uniform(0, 2, len(case.obs)), group=group)


@given(gentle(), st.integers(1, 4))
def test_surrogate_is_its_formula_with_weights_and_self_normalised_in_groups(case, group):
    case, batch = grouped(mild(case), group)
    theta = case.theta + 0.1 * case.rng.normal(size=case.theta.shape)
    expected = slow_surrogate(case.policy, theta, batch)
    assert isclose(tm.surrogate(case.policy, theta, batch), expected, rtol=1e-9, atol=1e-10)


@given(gentle(), st.booleans(), st.integers(1, 4))
def test_surrogate_grad_is_its_derivative_at_old_and_elsewhere_and_in_groups(case, elsewhere, group):
    case, batch = grouped(mild(case), group)
    theta = case.theta + 0.05 * elsewhere * case.rng.normal(size=case.theta.shape)
    d = case.rng.normal(size=theta.shape)
    d /= np.linalg.norm(d) * (1 + np.abs(case.obs).max())
    h = 1e-4
    values = [slow_surrogate(case.policy, theta + s * h * d, batch) for s in (-2, -1, 1, 2)]
    difference = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)  # fourth order
    scale = (
        1
        + np.abs(values).max()
        + np.abs(batch.adv).max() * np.abs(tm.score(case.policy, batch.mu_old, batch.actions)).max() ** 5
    )
    assert abs(tm.surrogate_grad(case.policy, theta, batch) @ d - difference) <= 1e3 * scale * (h**4 + EPS / h)


@given(gentle(), st.integers(2, 4))
def test_a_baseline_added_in_each_state_changes_nothing_in_groups(case, group):
    case, batch = grouped(mild(case), group)
    baseline = np.repeat(case.rng.normal(size=len(case.obs) // group), group)
    shifted = batch._replace(adv=batch.adv + baseline)
    grad, other = (tm.surrogate_grad(case.policy, case.theta, b) for b in (batch, shifted))
    size = np.abs(tm.score(case.policy, batch.mu_old, batch.actions)).max()
    bound = size_of(case.policy, case.theta, case.obs, np.ones_like(case.theta))[1].max() + 1
    rounding = tolerance(case, (1 + np.abs(shifted.adv).max()) * size * bound)
    assert np.abs(grad - other).max() <= rounding
    theta = case.theta + 0.1 * case.rng.normal(size=case.theta.shape)
    gain = [tm.surrogate(case.policy, theta, b) - tm.surrogate(case.policy, case.theta, b) for b in (batch, shifted)]
    assert isclose(*gain, rtol=0, atol=1e-12 * (1 + np.abs(shifted.adv).max()))


@given(cases(heads=("categorical",), max_rows=10, wide=6, scales=(0.3, 1.0)))
def test_surrogate_grad_summed_over_all_actions_is_the_policy_gradient(case):
    """sum_a pi(a|s) A(s, a) has the gradient J^T (dp/dmu)^T A; rows (s, a) with weights pi B give the same."""
    actions = all_actions(case.policy)
    B, n = len(actions), len(case.obs)
    adv = case.rng.normal(size=(n, B))
    mu, J = dense_forward(*case[:3]), dense_jacobian(*case[:3])
    expected = np.zeros_like(case.theta)
    for row in range(n):
        for b, a in enumerate(actions):
            ps = [scipy.special.softmax(mu[row, g]) for g in groups(case.policy)]
            p = np.prod([p[i] for p, i in zip(ps, a, strict=True)])
            score = np.concatenate([np.eye(len(q))[i] - q for q, i in zip(ps, a, strict=True)])
            expected += p * adv[row, b] * score @ J[row] / n
    rows = np.repeat(np.arange(n), B)
    flat_actions, mu_rows = np.tile(actions, (n, 1)), tm.forward(*case[:3])[rows]
    weights = B * np.exp(tm.log_prob(case.policy, mu_rows, flat_actions))
    batch = tm.Batch(case.obs[rows], flat_actions, adv.ravel(), mu_rows, weights)
    ours = tm.surrogate_grad(case.policy, case.theta, batch)
    bound = np.abs(adv).max() * len(ours) * np.abs(J).max()
    assert np.abs(ours - expected).max() <= tolerance(case._replace(obs=case.obs[rows]), bound)


@given(update_cases())
def test_an_accepted_update_is_inside_the_trust_region_and_better_and_a_rejected_one_is_no_update(case):
    batch = make_batch(case)
    theta, info = tm.trpo_update(case.policy, case.theta, batch, CONFIG)
    kl = slow_kl(case.policy, batch.mu_old, dense_forward(case.policy, theta, case.obs)).mean()
    before, after = (slow_surrogate(case.policy, t, batch) for t in (case.theta, theta))
    rounding = 1e-9 * (1 + np.abs(batch.adv).max())
    if info.accepted:
        assert kl <= CONFIG.max_kl * (1 + 1e-9)
        assert after > before - rounding
        assert (theta != case.theta).any()
        assert info.surrogate > info.surrogate_old
        assert info.step_length > 0
    else:
        assert theta.tobytes() == case.theta.tobytes()
        assert info.kl <= 1e-12
        assert info.step_length == 0
    # UpdateInfo describes the parameters that were kept
    assert abs(info.kl - kl) <= 1e-9 * (1 + kl)
    assert abs(info.surrogate - after) <= rounding * np.exp(1)
    assert abs(info.surrogate_old - before) <= rounding
    mu = dense_forward(case.policy, theta, case.obs)
    rows = slow_kl(case.policy, batch.mu_old, mu)
    assert abs(info.kl_largest - rows.max()) <= 1e-8 * (1 + rows.max())
    assert isclose(info.entropy, tm.entropy(case.policy, mu).mean(), rtol=1e-9, atol=1e-9)
    assert isclose(info.grad_norm, np.linalg.norm(tm.surrogate_grad(case.policy, case.theta, batch)), rtol=1e-9)
    assert info.adv_largest == np.abs(batch.adv).max()


@pytest.mark.parametrize("head", ["categorical", "gaussian"])
def test_an_update_reports_the_residual_of_its_solve_in_the_units_of_the_gradient(head):
    case = fixed_case(head)
    batch, config = make_batch(case, 100 * case.rng.normal(size=60)), tm.Config(cg_iters=3)
    grad = tm.surrogate_grad(case.policy, case.theta, batch)
    c = config.damping * ((np.exp(-2 * case.theta[-4:]) / 3).mean() if head == "gaussian" else 1)
    F, P = lambda p: tm.fvp(*case[:3], p, c), preconditioner(case, c)
    solved = tm.cg(F, grad, config.cg_iters, config.cg_tol, precondition=P)
    _, info = tm.trpo_update(case.policy, case.theta, batch, config)
    assert isclose(info.cg_residual, solved.residual_norm, rtol=1e-6) and solved.residual_norm > 1e-3 * info.grad_norm


@given(update_cases())
def test_an_update_is_accepted_on_ordinary_batches(case):
    case = mild(case)
    assume(tm.entropy(case.policy, tm.forward(*case[:3])).max() > 0.1 or case.policy.head == "gaussian")
    batch = make_batch(case)
    assume(np.linalg.norm(tm.surrogate_grad(case.policy, case.theta, batch)) > 1e-3)
    _, info = tm.trpo_update(case.policy, case.theta, batch, CONFIG._replace(max_kl=1e-4, max_backtracks=40))
    assert info.accepted, info.reason


@given(update_cases())
def test_zero_advantages_change_nothing_and_warn_of_nothing(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theta, info = tm.trpo_update(case.policy, case.theta, make_batch(case, np.zeros(len(case.obs))), CONFIG)
    assert theta.tobytes() == case.theta.tobytes()
    assert (info.accepted, info.reason, info.cg_iters, info.kl <= 1e-12) == (False, "zero gradient", 0, True)
    assert info.cg_status == "converged"
    assert (info.backtracks, info.step_length) == (0, 0.0)


@given(update_cases())
def test_an_update_is_a_pure_function_of_its_arguments(case):
    batch = make_batch(case)
    held = [case.theta, *batch[:4]]
    for array in held:
        array.flags.writeable = False
    before, state = [a.copy() for a in held], np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (tm.trpo_update(case.policy, case.theta, batch, CONFIG) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1] == second[1]
    assert all((a == b).all() for a, b in zip(held, before, strict=True))
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


@given(update_cases(), st.sampled_from([1e-300, 1e-8, 3.0, 1e8, 1e300]))
def test_scaling_all_advantages_leaves_the_step_unchanged(case, factor):
    case = mild(case)
    batch = make_batch(case)
    config = CONFIG._replace(damping=0.1, cg_iters=3)
    one, info = tm.trpo_update(case.policy, case.theta, batch, config)
    other, scaled = tm.trpo_update(case.policy, case.theta, batch._replace(adv=batch.adv * factor), config)
    assert one.shape == other.shape
    # dividing by the largest advantage rounds once, which CG amplifies by a few condition numbers
    if info.backtracks == scaled.backtracks:
        assert np.abs(one - other).max() <= 1e-6 * np.abs(one - case.theta).max()


@given(cases(heads=("gaussian",), scales=(0.3, 1.0), max_rows=100), st.floats(0.1, 10))
def test_all_sigmas_times_a_factor_leave_the_direction_of_the_step_in_the_weights(case, factor):
    case = mild(case)
    A, config, steps = case.policy.sizes[-1], tm.Config(damping=0.1, cg_iters=300, cg_tol=1e-10), []
    z, adv = case.rng.normal(size=(2, len(case.obs), A))
    for k in (1.0, factor):
        theta = case.theta.copy()
        theta[-A:] += np.log(k)
        mu = tm.forward(case.policy, theta, case.obs)
        batch = tm.Batch(case.obs, mu[:, :A] + np.exp(theta[-A:]) * z, adv[:, 0], mu)
        new, info = tm.trpo_update(case.policy, theta, batch, config)
        steps.append((new - theta)[:-A])
        assume(info.accepted and info.cg_status == "converged" and np.abs(steps[-1]).max() > 1e-3 * np.abs(theta).max())
    # each solve is off by 1e-10 |g|, g in log_std included, over a damping of 0.03 / sigma^2 at least
    one, other = (step / np.linalg.norm(step) for step in steps)
    assert np.linalg.norm(one - other) <= 1e-6


@given(update_cases(), st.floats(1e-6, 1e-1))
def test_half_the_quadratic_of_the_full_step_is_max_kl(case, max_kl):
    batch = make_batch(case)
    _, info = tm.trpo_update(case.policy, case.theta, batch, CONFIG._replace(max_kl=max_kl, damping=0.3))
    if info.accepted:
        full = info.step_length / CONFIG.backtrack_coef**info.backtracks
        assert isclose(0.5 * full**2 * info.curvature, max_kl, rtol=1e-10)


@given(update_cases(), st.sampled_from([0.0, 1e-3, 0.3]))
def test_the_curvature_is_that_of_the_undamped_fisher_along_the_step(case, damping):
    case = mild(case)
    theta, info = tm.trpo_update(
        case.policy, case.theta, make_batch(case), CONFIG._replace(damping=damping, max_kl=1e-5)
    )
    if info.accepted:
        step_dir = (theta - case.theta) / info.step_length
        dense = step_dir @ dense_fisher(*case[:3]) @ step_dir
        rounding = EPS * np.abs(case.theta).max() / np.abs(theta - case.theta).max()
        assert isclose(info.curvature, dense, rtol=1e-6 + 1e3 * rounding)


def test_the_curvature_keeps_its_precision_where_the_damping_dwarfs_it():
    rng = np.random.default_rng(0)
    policy = tm.Policy((2, 2), "categorical", (2,))
    theta = np.array([0.1, 0.2, 0.3, 0.4, 0.0, 30.0])  # p(0) = 1e-13, and so is M
    obs = rng.normal(size=(20, 2))
    mu = tm.forward(policy, theta, obs)
    batch = tm.Batch(obs, rng.integers(2, size=(20, 1)), rng.normal(size=20), mu)
    acts = tm._activations(theta, np.array(policy.sizes), obs)
    grad = tm.surrogate_grad(policy, theta, batch._replace(adv=batch.adv / np.abs(batch.adv).max()))
    config = tm.Config(cg_tol=1e-10)
    x = tm._solve(theta, grad, *tm._fisher(policy, acts, tm._outputs(policy, theta, acts)), 1.0, config)[0]
    p = scipy.special.expit(mu[:, 0] - mu[:, 1])
    along = obs @ (x[[0, 2]] - x[[1, 3]]) + x[4] - x[5]
    for cg_tol, rtol in ((1e-10, 1e-9), (0.01, 1e-5)):  # products in float64; in float32, whose rounding is 6e-8
        _, info = tm.trpo_update(policy, theta, batch, tm.Config(damping=1.0, max_backtracks=1, cg_tol=cg_tol))
        assert isclose(info.curvature, np.mean(p * (1 - p) * along**2), rtol=rtol)


@given(gentle())
def test_kl_over_max_kl_goes_to_one_as_max_kl_goes_to_zero(case):
    case = mild(case)
    batch, errors = make_batch(case), []
    assume(np.linalg.norm(tm.surrogate_grad(case.policy, case.theta, batch)) > 1e-2)
    for max_kl in (1e-4, 1e-6, 1e-8):
        config = CONFIG._replace(max_kl=max_kl, backtrack_coef=0.999, max_backtracks=2000, damping=0.1)
        _, info = tm.trpo_update(case.policy, case.theta, batch, config)
        assert info.accepted
        errors.append(abs(info.kl / max_kl - 1))
    # KL = max_kl + third order: the error falls with the root of max_kl, down to one backtrack of 0.1%
    assert errors[2] <= max(errors[0] / 50, 0.003), errors


@given(update_cases(), st.floats(1e-6, 1e-2))
def test_the_direction_does_not_depend_on_max_kl(case, max_kl):
    case = mild(case)
    batch = make_batch(case)
    steps = []
    for radius in (max_kl, 1e-4):
        theta, info = tm.trpo_update(case.policy, case.theta, batch, CONFIG._replace(max_kl=radius))
        assume(info.accepted)
        steps.append((theta - case.theta) / info.step_length)
    moved = min(np.abs(s).max() for s in steps) * 1e-3
    assume(moved > 1e-8)
    assert np.abs(steps[0] - steps[1]).max() <= 1e-6 * np.abs(steps[0]).max() + 1e4 * EPS * np.abs(case.theta).max()


@given(update_cases())
def test_a_search_that_fails_gives_theta_back_bitwise(case):
    batch = make_batch(case)
    theta, info = tm.trpo_update(case.policy, case.theta, batch, CONFIG._replace(max_kl=1e9, max_backtracks=1))
    if not info.accepted:
        assert theta.tobytes() == case.theta.tobytes()
        assert info.surrogate == info.surrogate_old


@pytest.mark.parametrize(
    ("direction", "curvature"),
    [(-1.0, 1.0), (1.0, -1.0), (1.0, 0.0), (1.0, np.nan), (np.nan, 1.0), (np.inf, 1.0), (1.0, np.inf)],
)
def test_a_bad_direction_or_curvature_is_refused_and_theta_kept(monkeypatch, direction, curvature):
    case = fixed_case()
    stub = lambda theta, b, *_: (direction * b, 0.0, 1, 2, curvature)  # noqa: E731
    monkeypatch.setattr(tm, "_solve", stub)
    theta, info = tm.trpo_update(case.policy, case.theta, make_batch(case))
    assert not info.accepted
    assert theta.tobytes() == case.theta.tobytes()
    assert info.kl <= 1e-12
    assert info.reason.startswith("none of" if 0 < curvature < np.inf else f"no step: curvature {curvature}")


def test_the_line_search_takes_the_first_candidate_that_has_both(monkeypatch):
    case = fixed_case()
    batch = make_batch(case)
    real = tm._solve

    def too_long(*args):
        return *real(*args)[:4], real(*args)[4] / 30  # as if the model had promised a longer step

    monkeypatch.setattr(tm, "_solve", too_long)
    theta, info = tm.trpo_update(case.policy, case.theta, batch, tm.Config(max_kl=0.01))
    assert info.accepted
    assert info.backtracks > 0
    step_dir = (theta - case.theta) / info.step_length
    for j in range(info.backtracks):
        candidate = case.theta + info.step_length / 0.8 ** (info.backtracks - j) * step_dir
        kl = slow_kl(case.policy, batch.mu_old, dense_forward(case.policy, candidate, case.obs)).mean()
        assert kl > 0.01 or slow_surrogate(case.policy, candidate, batch) <= info.surrogate_old


def test_a_step_too_short_to_change_theta_is_refused_as_it_is_no_better():
    case = fixed_case()
    theta, info = tm.trpo_update(case.policy, case.theta, make_batch(case), tm.Config(max_kl=1e-60))
    assert theta.tobytes() == case.theta.tobytes()
    assert not info.accepted and info.reason.startswith("none of")


def test_a_batch_of_one_row_and_identical_rows_update_without_nan():
    for head in ("categorical", "gaussian"):
        for n in (1, 5):
            case = fixed_case(head, n)
            case = case._replace(obs=np.repeat(case.obs[:1], n, axis=0))
            theta, info = tm.trpo_update(case.policy, case.theta, make_batch(case, np.ones(n)))
            assert np.isfinite(theta).all()
            assert info.kl <= tm.Config().max_kl


@given(update_cases(), seeds)
def test_float32_updates_keep_the_promises_of_float64(case, seed):
    case = mild(case)
    batch = make_batch(case)
    batch32 = batch._replace(
        obs=batch.obs.astype(np.float32), mu_old=tm.forward(case.policy, case.theta.astype(np.float32), case.obs)
    )
    theta, info = tm.trpo_update(case.policy, case.theta.astype(np.float32), batch32, CONFIG._replace(damping=0.1))
    assert theta.dtype == np.float32
    if info.accepted:
        kl = slow_kl(case.policy, batch.mu_old, dense_forward(case.policy, theta.astype(float), case.obs)).mean()
        # mu carries eps32 x roundings x size; KL ~ dmu M dmu / 2 moves with its root
        error = tolerance(case, size_of(*case[:3])[0]) * np.finfo(np.float32).eps / EPS
        assert kl <= (np.sqrt(CONFIG.max_kl) + np.exp(1) * error) ** 2 * (1 + 1e-4)


@given(cases(scales=(0.3, 1.0), max_rows=100))
def test_float32_products_agree_with_float64_to_single_precision(case):
    v = case.rng.normal(size=case.theta.shape)
    single = [a.astype(np.float32) for a in (case.theta, case.obs, v)]
    Fv = tm.fvp(case.policy, *single)
    assert Fv.dtype == np.float32
    again = [a.astype(np.float64) for a in single]
    exact = tm.fvp(case.policy, *again)
    bound = bound_fvp(case._replace(theta=again[0]), np.abs(v))
    # a softmax moves with its logits: one more factor of the size of mu, which tolerance has
    assert np.abs(Fv - exact).max() <= 8 * tolerance(case, bound) * np.finfo(np.float32).eps / EPS


# ============================================================================== E8, E9: advantages, value function
@given(seeds, st.integers(1, 12), st.integers(1, 4), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_its_definition_summed_in_quadratic_time(seed, T, E, gamma, lam):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, T, E))
    terminated, truncated = rng.random((2, T, E)) < 0.2
    adv, returns = tm.gae(rewards, values, next_values, terminated, truncated, gamma, lam)
    for e in range(E):
        for t in range(T):
            total = 0.0
            for k in range(t, T):
                bootstrap = 0.0 if terminated[k, e] else next_values[k, e]
                total += (gamma * lam) ** (k - t) * (rewards[k, e] + gamma * bootstrap - values[k, e])
                if terminated[k, e] or truncated[k, e]:
                    break
            assert isclose(adv[t, e], total, rtol=1e-12, atol=100 * T * EPS)
    assert (returns == adv + values).all()


@given(seeds, st.integers(2, 10), st.floats(0.1, 1))
def test_gae_is_the_td_error_at_lambda_0_and_the_return_minus_the_value_at_lambda_1(seed, T, gamma):
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, T, 1))
    last = rng.normal()
    next_values = np.concatenate([values[1:], [[last]]])
    never = np.zeros((T, 1), bool)
    td, _ = tm.gae(rewards, values, next_values, never, never, gamma, 0.0)
    assert allclose(td, rewards + gamma * next_values - values, atol=10 * EPS, rtol=1e-14)
    monte_carlo, _ = tm.gae(rewards, values, next_values, never, never, gamma, 1.0)
    G = last
    for t in range(T - 1, -1, -1):
        G = rewards[t, 0] + gamma * G
        assert isclose(monte_carlo[t, 0], G - values[t, 0], rtol=1e-12, atol=100 * T * EPS)


@given(seeds, st.integers(2, 10), st.booleans())
def test_nothing_after_an_episodes_end_reaches_back_over_it(seed, T, by_termination):
    rng = np.random.default_rng(seed)
    rewards, values, next_values = rng.normal(size=(3, T, 1))
    end = rng.integers(T - 1)
    terminated, truncated = np.zeros((2, T, 1), bool)
    (terminated if by_termination else truncated)[end] = True
    first, _ = tm.gae(rewards, values, next_values, terminated, truncated, 0.9, 0.9)
    rewards[end + 1 :] += 100
    values[end + 1 :] -= 100
    next_values[end + (0 if by_termination else 1) :] += 100
    second, _ = tm.gae(rewards, values, next_values, terminated, truncated, 0.9, 0.9)
    assert (first[: end + 1] == second[: end + 1]).all()


def test_exact_values_give_zero_advantages_also_at_a_time_limit():
    """A reward of 1 for ever is worth 1/(1-gamma) everywhere; a truncation must not make it look like less."""
    gamma = 0.9
    V = np.full((5, 1), 1 / (1 - gamma))
    truncated = np.array([[0], [0], [1], [0], [0]], bool)
    adv, _ = tm.gae(np.ones((5, 1)), V, V, np.zeros((5, 1), bool), truncated, gamma, 0.95)
    assert np.abs(adv).max() <= 100 * EPS


@given(cases(heads=("value",), scales=(0.1, 0.5), max_rows=100, wide=8))
def test_fit_value_never_raises_the_error(case):
    returns = case.rng.normal(size=len(case.obs)) * 10.0 ** case.rng.integers(-3, 4)
    first = dense_forward(*case[:3])[:, 0]
    old = first + np.mean(returns - first)  # the bias takes that first
    phi = tm.fit_value(case.policy, case.theta, case.obs, returns, CONFIG._replace(value_iters=1))
    new = dense_forward(case.policy, phi, case.obs)[:, 0]
    before, after = np.square(old - returns).mean(), np.square(new - returns).mean()
    assert after <= before * (1 + 1e-9) + np.square(100 * EPS * (1 + np.abs([first, new, returns]).max()))


@given(seeds, st.integers(1, 5), st.floats(1e-3, 1e3))
def test_fit_value_of_a_linear_value_function_solves_least_squares(seed, D, size):
    """In one step, however far: nothing cuts it."""
    rng = np.random.default_rng(seed)
    value = tm.Policy((D, 1), "value")
    obs, returns = rng.normal(size=(40, D)), size * rng.normal(size=40)
    config = tm.Config(value_iters=1, value_damping=0.0, cg_iters=20, cg_tol=1e-9)
    first, X = tm.init_params(value, rng), np.c_[obs, np.ones(40)]
    phi = tm.fit_value(value, first, obs, returns, config)
    # |x - exact| <= |A^-1| |residual| of A x = b, A = X^T X / 40 and b = X^T error / 40; |A^-1| = 40 / smallest^2
    singular, error = np.linalg.svd(X, compute_uv=False), np.linalg.norm(returns - X @ first)
    off = (1e-9 + 1e3 * EPS) * singular[0] * error / singular[-1] ** 2
    assert np.linalg.norm(phi - np.linalg.lstsq(X, returns, rcond=None)[0]) <= off


@given(cases(heads=("value",), scales=(0.3,), wide=6), st.floats(0.01, 1.0))
def test_a_short_value_step_is_the_dense_damped_gauss_newton_step(case, damping):
    old, J = dense_forward(*case[:3])[:, 0], dense_jacobian(*case[:3])[:, 0]
    error = 1e-5 * case.rng.normal(size=len(old))
    error -= error.mean()  # the bias would take it
    variance = np.var(old + error)
    assume(variance > 1e-3)
    damping *= variance
    F, b = J.T @ J / len(old) + damping * np.eye(len(case.theta)), J.T @ error / len(old)
    step = np.linalg.solve(F, b)
    predicted, actual = (dense_forward(case.policy, case.theta + step, case.obs)[:, 0] - old, J @ step)
    assume(np.linalg.norm(predicted - actual) <= 0.01 * np.linalg.norm(actual))  # short enough to be kept whole
    config = tm.Config(value_iters=1, value_damping=damping / variance, cg_iters=300, cg_tol=1e-9)
    phi = tm.fit_value(case.policy, case.theta, case.obs, old + error, config)
    # the residual that cg may leave, and rounding of F x, of the error as a difference of values, and of phi
    residual = 1e-9 * np.linalg.norm(b) + 1e3 * EPS * np.linalg.norm(F, 2) * np.linalg.norm(step)
    residual += 1e3 * EPS * np.abs(J).max() * (1 + np.abs(old).max())
    assert np.linalg.norm(phi - case.theta - step) <= residual / damping + 10 * EPS * np.linalg.norm(case.theta)


@given(cases(heads=("value",), scales=(0.3,), wide=6))
def test_a_value_step_of_one_conjugate_gradient_iteration_goes_along_the_gradient(case):
    old, J = dense_forward(*case[:3])[:, 0], dense_jacobian(*case[:3])[:, 0]
    error = case.rng.normal(size=len(old))
    error -= error.mean()  # the bias would take it
    config = tm.Config(value_iters=1, cg_iters=1, cg_tol=0.0, precondition=False)
    step, gradient = tm.fit_value(*case[:3], old + error, config) - case.theta, J.T @ error
    lengths = np.linalg.norm(step), np.linalg.norm(gradient)
    assume(lengths[0] > 1e-3 * (1 + np.linalg.norm(case.theta)) and lengths[1] > 1e-3)  # more than its rounding
    assert isclose(step @ gradient, lengths[0] * lengths[1], rtol=1e-9)


@given(cases(heads=("value",), scales=(0.1, 0.5), max_rows=50, wide=8), st.floats(-1e3, 1e3))
def test_returns_that_are_all_higher_move_the_bias_of_the_value_function_and_nothing_else(case, height):
    returns = dense_forward(*case[:3])[:, 0] + case.rng.normal(size=len(case.obs))
    config = tm.Config(value_iters=1, cg_tol=1e-10)
    low, high = (tm.fit_value(*case[:3], returns + more, config) for more in (0.0, height))
    assume(np.var(returns) > 1e-3)
    # the errors differ by eps x 1e3, and the step of each is at most J over the damping as long
    damping = config.value_damping * np.var(returns)
    size = 100 * EPS * (1e3 + np.abs(returns).max()) * (1 + np.abs(dense_jacobian(*case[:3])).max() / damping)
    assert np.abs(high[:-1] - low[:-1]).max() <= size and isclose(high[-1] - low[-1], height, rtol=1e-9, atol=size)


@pytest.mark.parametrize(("dtype", "size"), [("float64", 1e150), ("float32", 1e30)])
def test_the_value_fit_is_the_same_for_large_returns_of_a_linear_value_function(dtype, size):
    value, rng = tm.Policy((3, 1), "value"), np.random.default_rng(0)
    obs, returns = rng.normal(size=(40, 3)).astype(dtype), rng.normal(size=40).astype(dtype)
    config, sizes = tm.Config(value_damping=0.0), (1, np.dtype(dtype).type(size))
    small, large = (tm.fit_value(value, np.zeros(4, dtype), obs, k * returns, config) for k in sizes)
    assert allclose(large / size, small, rtol=1e3 * np.finfo(dtype).eps)


def test_returns_whose_squares_overflow_are_refused():
    value, returns = tm.Policy((3, 4, 1), "value"), np.array([1e307, -1e307] * 10)
    phi, obs = tm.init_params(value, np.random.default_rng(0)), np.ones((20, 3))
    with pytest.raises(ValueError, match="squares of returns overflow, of up to 1e"):
        tm.fit_value(value, phi, obs, returns)


@pytest.mark.parametrize("size", [1e100, 1e200, 1e300])
def test_a_value_fit_on_huge_observations_ends_and_its_error_does_not_rise(size):
    value, rng = tm.Policy((3, 4, 1), "value"), np.random.default_rng(0)
    phi, obs, returns = tm.init_params(value, rng), size * rng.normal(size=(20, 3)), rng.normal(size=20)
    old, new = (tm.forward(value, p, obs)[:, 0] for p in (phi, tm.fit_value(value, phi, obs, returns)))
    assert np.square(new - returns).sum() <= np.square(old - returns).sum()


@given(cases(heads=("value",), max_rows=30, wide=6, scales=(0.3,)))
def test_the_metric_of_the_value_function_makes_fvp_its_gauss_newton_matrix(case):
    v = case.rng.normal(size=case.theta.shape)
    J = dense_jacobian(*case[:3])[:, 0]
    unit = size_of(*case[:3], np.ones_like(v))[1]
    bound = (unit * size_of(*case[:3], v)[1]).mean()
    assert np.abs(tm.fvp(*case[:3], v) - J.T @ (J @ v) / len(J)).max() <= tolerance(case, bound)


# ============================================================================================== E11: why it works
class MDP(NamedTuple):
    """A finite Markov decision process: P (S, A, S), r (S, A), start (S,), gamma."""

    P: np.ndarray
    r: np.ndarray
    start: np.ndarray
    gamma: float

    def solve(self, pi):
        """eta, Q (S, A), the advantages (S, A) and the discounted state distribution (S,), which adds up to
        1 / (1 - gamma), of pi (S, A); complex pi allowed, for derivatives."""
        transition = np.einsum("sa,sat->st", pi, self.P)
        inverse = np.linalg.inv(np.eye(len(pi)) - self.gamma * transition)
        V = inverse @ (pi * self.r).sum(axis=1)
        Q = self.r + self.gamma * self.P @ V
        return self.start @ V, Q, Q - V[:, None], self.start @ inverse

    def expected_surrogate(self, old, new):
        """L_old(new) - eta(old): the expected advantage of new under the states of old, added up."""
        _, _, adv, visits = self.solve(old)
        return visits @ (new * adv).sum(axis=1)

    def rounding(self, adv):
        """A bound on the rounding of what solve returns: eps x operations x the inverse's condition x the numbers."""
        return 1e3 * EPS * self.r.size * (1 + np.abs(adv).max()) / (1 - self.gamma) ** 2


@st.composite
def mdps(draw, largest_gamma=0.95):
    """Random chances, rewards and starts; some transitions are certain, some states unreachable at first."""
    rng = np.random.default_rng(draw(seeds))
    S, A, concentration = draw(st.integers(2, 5)), draw(st.integers(2, 4)), draw(st.sampled_from([0.05, 1.0]))
    P, start = rng.dirichlet(np.full(S, concentration), (S, A)), rng.dirichlet(np.full(S, concentration))
    return MDP(P, rng.normal(size=(S, A)), start, draw(st.floats(0, largest_gamma))), rng


def softmax_policy(mdp, rng, hidden=(), scale=1.0):
    """A policy on one-hot observations of the states, and its parameters."""
    S, A = mdp.r.shape
    policy = tm.Policy((S, *hidden, A), "categorical", (A,))
    return policy, tm.init_params(policy, rng) + scale * rng.normal(size=tm.n_params(policy))


def table(policy, theta):
    """pi (S, A) of a policy on one-hot observations; complex theta allowed."""
    logits = dense_forward(policy, theta, np.eye(policy.sizes[0]))
    weights = np.exp(logits - logits.real.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def exact_batch(mdp, policy, theta):
    """Every state with every action: the surrogate of this batch is (1 - gamma) (L_old(new) - eta(old)), exactly."""
    S, A = mdp.r.shape
    pi = table(policy, theta)
    _, _, adv, visits = mdp.solve(pi)
    weights = S * A * (1 - mdp.gamma) * visits[:, None] * pi
    obs, actions = np.repeat(np.eye(S), A, axis=0), np.tile(np.arange(A), S)[:, None]
    return tm.Batch(obs, actions, adv.ravel(), tm.forward(policy, theta, obs), weights.ravel())


def largest_kl(old, new):
    return max(scipy.special.rel_entr(old, new).sum(axis=1).max(), 0.0)  # rounding may leave it below


@given(heads, seeds, st.floats(0.01, 1))
def test_pinsker_bounds_the_squared_total_variation_by_half_the_kl(policy, seed, distance):
    rng = np.random.default_rng(seed)
    old = random_mu(policy, rng, 1, 0.1)
    new = old + distance * rng.normal(size=old.shape)
    if policy.head == "categorical":
        actions = all_actions(policy)
        p, q = (np.exp(tm.log_prob(policy, np.tile(mu, (len(actions), 1)), actions)) for mu in (old, new))
        variation = 0.5 * np.abs(p - q).sum()
    else:
        policy, A = tm.Policy((1, 1), "gaussian"), policy.sizes[-1]
        old, new = old[:, [0, A]], new[:, [0, A]]
        a = old[0, 0] + np.exp(old[0, 1]) * np.linspace(-40, 40, 80_001)[:, None]
        p, q = (np.exp(tm.log_prob(policy, np.tile(mu, (len(a), 1)), a)) for mu in (old, new))
        variation = 0.5 * scipy.integrate.trapezoid(np.abs(p - q), a[:, 0])
    assert variation**2 <= tm.kl(policy, old, new)[0] / 2 + 1e-9


@given(mdps())
def test_the_gain_of_a_policy_is_its_expected_advantage_over_the_old_one_in_its_own_states(case):
    mdp, rng = case
    old, new = rng.dirichlet(np.ones(mdp.r.shape[1]), (2, len(mdp.r)))
    eta, _, adv, _ = mdp.solve(old)
    eta_new, _, _, visits_new = mdp.solve(new)
    assert isclose(eta_new - eta, visits_new @ (new * adv).sum(axis=1), atol=mdp.rounding(adv))


@given(mdps(), st.sampled_from([(), (4,), (3, 3)]))
def test_the_surrogate_has_the_gradient_of_the_return_at_old(case, hidden):
    mdp, rng = case
    policy, theta = softmax_policy(mdp, rng, hidden)
    batch = exact_batch(mdp, policy, theta)
    grad_eta = gradient_of_the_return(mdp, policy, theta)
    assert abs(tm.surrogate(policy, theta, batch)) <= mdp.rounding(batch.adv)  # L_old(old) = eta(old)
    difference = tm.surrogate_grad(policy, theta, batch) / (1 - mdp.gamma) - grad_eta
    assert np.abs(difference).max() <= mdp.rounding(batch.adv)


def gradient_of_the_return(mdp, policy, theta):
    """By complex steps through the exact solution."""
    steps = theta + 1e-30j * np.eye(len(theta))
    return np.array([mdp.solve(table(policy, moved))[0].imag / 1e-30 for moved in steps])


@given(mdps(), st.sampled_from([(), (4,)]))
def test_the_full_sum_over_actions_with_exact_q_is_the_exact_policy_gradient(case, hidden):
    mdp, rng = case
    policy, theta = softmax_policy(mdp, rng, hidden)
    S, A = mdp.r.shape
    pi = table(policy, theta)
    _, Q, _, visits = mdp.solve(pi)
    total = np.zeros_like(theta)
    for s in range(S):  # of each state, every action
        obs = np.tile(np.eye(S)[s], (A, 1))
        mu = tm.forward(policy, theta, obs)
        batch = tm.Batch(obs, np.arange(A)[:, None], Q[s], mu, A * pi[s], A)
        total += visits[s] * tm.surrogate_grad(policy, theta, batch)
    assert np.abs(total - gradient_of_the_return(mdp, policy, theta)).max() <= mdp.rounding(Q)


@given(mdps(), st.floats(0, 1))
def test_the_bound_on_the_improvement_is_a_lower_bound_for_any_two_policies(case, mix):
    mdp, rng = case
    old, other = rng.dirichlet(np.ones(mdp.r.shape[1]), (2, len(mdp.r)))
    new = (1 - mix) * old + mix * other
    eta, _, adv, _ = mdp.solve(old)
    gain, surrogate = mdp.solve(new)[0] - eta, (1 - mdp.gamma) * mdp.expected_surrogate(old, new)
    alpha, epsilon = 0.5 * np.abs(old - new).sum(axis=1).max(), np.abs(adv).max()
    for distance in (alpha**2, largest_kl(old, new)):
        assert gain >= tm.improvement_lower_bound(surrogate, epsilon, distance, mdp.gamma) - mdp.rounding(adv)


@given(mdps(), st.sampled_from([(), (4,)]), st.sampled_from([1e-4, 1e-2, 0.5]))
def test_the_bound_on_the_improvement_is_a_lower_bound_for_an_update(case, hidden, max_kl):
    mdp, rng = case
    policy, theta = softmax_policy(mdp, rng, hidden)
    batch = exact_batch(mdp, policy, theta)
    new, info = tm.trpo_update(policy, theta, batch, tm.Config(max_kl=max_kl, damping=1e-3))
    bound = tm.improvement_lower_bound(
        info.surrogate - info.surrogate_old, info.adv_largest, info.kl_largest, mdp.gamma
    )
    gain = mdp.solve(table(policy, new))[0] - mdp.solve(table(policy, theta))[0]
    assert gain >= bound - mdp.rounding(batch.adv)
    # and it is the bound of theorem 1, in which nothing is divided by the mass of the visits
    old, new = table(policy, theta), table(policy, new)
    penalty = 4 * np.abs(batch.adv).max() * mdp.gamma / (1 - mdp.gamma) ** 2 * largest_kl(old, new)
    assert isclose(bound, mdp.expected_surrogate(old, new) - penalty, rtol=1e-9, atol=mdp.rounding(batch.adv))


def best_within(mdp, old, max_kl):
    """The policy of the largest surrogate among those with KL(old || new) <= max_kl in every state.

    In each state new = old / (nu - adv), normalised: the stationary point of the Lagrangian, nu found by bisection.
    """
    adv = mdp.solve(old)[2]
    new = np.empty_like(old)
    for s in range(len(old)):
        low, high = -30.0, 30.0  # log of nu - max adv
        for _ in range(200):
            middle = (low + high) / 2
            new[s] = old[s] / (adv[s].max() + np.exp(middle) - adv[s])
            new[s] /= new[s].sum()
            low, high = (middle, high) if scipy.special.rel_entr(old[s], new[s]).sum() > max_kl else (low, middle)
        new[s] = old[s] / (adv[s].max() + np.exp(high) - adv[s])
        new[s] /= new[s].sum()
    return new


def best_of_the_bound(mdp, old):
    """The policy that maximises the bound: L is concave in the largest KL allowed, so a search over that is enough."""
    epsilon = np.abs(mdp.solve(old)[2]).max()

    def bound(log_kl):
        new = best_within(mdp, old, np.exp(log_kl))
        surrogate = (1 - mdp.gamma) * mdp.expected_surrogate(old, new)
        return tm.improvement_lower_bound(surrogate, epsilon, largest_kl(old, new), mdp.gamma)

    found = scipy.optimize.minimize_scalar(lambda k: -bound(k), bounds=(-25, 1), method="bounded")
    return (best_within(mdp, old, np.exp(found.x)), np.exp(found.x)) if bound(found.x) > 0 else (old, 0.0)


@pytest.mark.slow
@given(mdps())
@settings(max_examples=8)
def test_maximising_the_bound_never_lowers_the_return(case):
    mdp, rng = case
    pi = rng.dirichlet(np.ones(mdp.r.shape[1]), len(mdp.r))
    for _ in range(3):
        eta, _, adv, _ = mdp.solve(pi)
        pi, _ = best_of_the_bound(mdp, pi)
        assert mdp.solve(pi)[0] >= eta - mdp.rounding(adv)


@pytest.mark.slow
@given(mdps(largest_gamma=0.99))
@settings(max_examples=20)
def test_the_step_that_the_bound_allows_is_far_smaller_than_the_trust_regions(case):
    # a surrogate gain is at most eps sqrt(2 KL) by Pinsker, so a positive bound needs KL < ((1 - gamma) / gamma)^2 / 8
    mdp, rng = case
    mdp = mdp._replace(gamma=(mdp.gamma + 0.99) / 2)
    old = rng.dirichlet(np.ones(mdp.r.shape[1]), len(mdp.r))
    new, kl = best_of_the_bound(mdp, old)
    assert largest_kl(old, new) <= kl * (1 + 1e-9) + EPS
    assert kl <= ((1 - mdp.gamma) / mdp.gamma) ** 2 / 8
    assert tm.Config().max_kl / 700 > ((1 - 0.99) / 0.99) ** 2 / 8


@given(update_cases())
def test_the_mean_kl_never_exceeds_the_largest(case):
    _, info = tm.trpo_update(case.policy, case.theta, make_batch(case))
    assert info.kl <= info.kl_largest * (1 + len(case.obs) * EPS)


def test_an_update_within_the_mean_kl_may_break_the_largest():
    policy = tm.Policy((2, 2), "categorical", (2,))
    theta, obs = np.zeros(6), np.repeat(np.eye(2), [99, 1], axis=0)  # a state seen once, with all of the advantage
    batch = tm.Batch(obs, np.zeros((100, 1), int), obs[:, 1], tm.forward(policy, theta, obs))
    _, info = tm.trpo_update(policy, theta, batch, tm.Config(max_kl=0.01, damping=1e-3))
    assert info.accepted and info.kl <= 0.01 < 0.1 < info.kl_largest


@pytest.mark.slow
@given(mdps(largest_gamma=0.9), st.sampled_from([(), (8,)]))
@settings(max_examples=10)
def test_updates_with_exact_advantages_climb_to_within_a_percent_of_the_best_policy(case, hidden):
    mdp, rng = case
    mdp = mdp._replace(r=rng.random(mdp.r.shape), start=np.full(len(mdp.r), 1 / len(mdp.r)))  # positive values
    V = np.zeros(len(mdp.r))
    for _ in range(500):  # value iteration: what is left after it is below 0.9^500
        V = (mdp.r + mdp.gamma * mdp.P @ V).max(axis=1)
    policy, theta = softmax_policy(mdp, rng, hidden, scale=0.1)
    for _ in range(300):
        theta, _ = tm.trpo_update(policy, theta, exact_batch(mdp, policy, theta), tm.Config(damping=1e-4))
    assert mdp.solve(table(policy, theta))[0] >= 0.99 * mdp.start @ V


def linear_case(head, seed):
    """A network of one layer, whose F has at most the condition of its inputs, and a batch."""
    policy, rng = head._replace(sizes=(3, head.sizes[-1])), np.random.default_rng(seed)
    theta = 0.3 * rng.normal(size=tm.n_params(policy))
    case = Case(policy, theta, rng.normal(size=(60, 3)), rng)
    return case, make_batch(case)


several_heads = st.sampled_from(
    [tm.Policy((1, 2), "gaussian"), tm.Policy((1, 3), "categorical", (3,)), tm.Policy((1, 4), "categorical", (2, 2))]
)


@given(several_heads, seeds, st.floats(1.5, 5))
def test_the_natural_gradient_is_the_same_in_any_linear_coordinates_and_the_plain_one_is_not(head, seed, stretch):
    # theta = B psi: by the chain rule the gradient is B^T g, the metric B^T F B, and a step dpsi moves theta by B dpsi
    case, batch = linear_case(head, seed)
    F = lambda p: tm.fvp(case.policy, case.theta, case.obs, p)  # noqa: E731
    g = tm.surrogate_grad(case.policy, case.theta, batch)
    along, across = g / np.linalg.norm(g), case.rng.normal(size=len(g))
    across -= (across @ along) * along
    across /= np.linalg.norm(across)
    u = (along + across) / np.sqrt(2)
    B = np.eye(len(g)) + (stretch - 1) * np.outer(u, u)
    step = tm.cg(F, g, 200, 1e-12).x
    moved = B @ tm.cg(lambda p: B.T @ F(B @ p), B.T @ g, 200, 1e-12).x
    # as policies: F may have a null space, in which nothing changes
    assert (moved - step) @ F(moved - step) <= 1e-14 * (step @ F(step))
    plain = B @ (B.T @ g)
    k = (stretch**2 - 1) / 2
    assert isclose(plain @ along / np.linalg.norm(plain), (1 + k) / np.hypot(1 + k, k)) and k > 0.6


@given(several_heads, seeds)
def test_an_undamped_update_does_not_depend_on_the_coordinates_of_the_observations(head, seed):
    case, batch = linear_case(head, seed)
    T = np.linalg.qr(case.rng.normal(size=(3, 3)))[0] * case.rng.uniform(0.2, 5, size=3)
    n = 3 * head.sizes[-1]
    W = np.linalg.solve(T, case.theta[:n].reshape(3, -1))
    config = tm.Config(damping=0.0, cg_iters=200, cg_tol=1e-13)
    new, info = tm.trpo_update(case.policy, case.theta, batch, config)
    moved, other = tm.trpo_update(
        case.policy, np.concatenate([W.ravel(), case.theta[n:]]), batch._replace(obs=case.obs @ T), config
    )
    assert info.accepted and other.backtracks == info.backtracks
    mu, mu_moved = tm.forward(case.policy, new, case.obs), tm.forward(case.policy, moved, case.obs @ T)
    change = mu - batch.mu_old
    if head.head == "categorical":  # logits are a policy up to a constant for each choice
        mu, mu_moved = (
            np.concatenate([z[:, g] - z[:, g].mean(1, keepdims=True) for g in groups(head)], 1) for z in (mu, mu_moved)
        )
    assert np.abs(mu - mu_moved).max() <= 1e-6 * np.abs(change).max()


# ======================================================================================================== sampling
class Counter(gym.Env):
    """Observes (episode, step); episodes of irregular length, some terminated, some truncated, some both."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-1.0, 1.0, (1,))
    spec = None

    def __init__(self, salt=0):
        self.salt, self.episode, self.seen = salt, -1, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return self._obs(), {}

    def _obs(self):
        return np.array([self.episode, self.step_in_episode], np.float32)

    def step(self, action):
        assert self.action_space.contains(action)
        self.seen.append(action)
        self.step_in_episode += 1
        kind = (7 * self.episode + 3 * self.salt) % 5
        over = self.step_in_episode > kind
        reward = 100.0 * self.salt + 10 * self.episode + self.step_in_episode
        return self._obs(), reward, over and kind != 2, over and kind in (0, 2, 3), {}


def serial_rows(salt, n):
    """n rows (obs, reward, next obs, terminated, truncated) of a plain loop."""
    env, rows = Counter(salt), []
    obs, _ = env.reset()
    while len(rows) < n:
        following, reward, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
        rows.append((obs, reward, following, terminated, truncated))
        obs = env.reset()[0] if terminated or truncated else following
    return rows


def serial_episodes(salt, n):
    """(return, length) of each episode that ends in the first n rows."""
    finished, total, length = [], 0.0, 0
    for _, reward, _, terminated, truncated in serial_rows(salt, n):
        total, length = total + reward, length + 1
        if terminated or truncated:
            finished.append((total, length))
            total, length = 0.0, 0
    return finished


def start(envs, config=None, seed=0):
    config = config or tm.Config(hidden=())
    policy = tm.make_policy(envs.single_observation_space, envs.single_action_space, config.hidden)
    return tm.init_state("test", policy, config, seed), tm._first_runner(envs, 0)


def counters(n, mode, first=0):
    return SyncVectorEnv([lambda i=i: Counter(first + i) for i in range(n)], autoreset_mode=mode)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@given(E=st.integers(1, 4), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_every_autoreset_mode_gives_exactly_the_rows_of_a_serial_loop(mode, E, lengths):
    envs = counters(E, mode)
    state, runner = start(envs)
    rng, rows, ends = np.random.default_rng(0), [[] for _ in range(E)], [[] for _ in range(E)]
    for n_steps in lengths:
        rollout, runner = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, rng, n_steps)
        assert mode == AutoresetMode.NEXT_STEP or rollout.real.all()
        assert len(rollout.final_at) == len(rollout.final_obs) == (rollout.truncated & ~rollout.terminated).sum()
        for e in range(E):
            for t in np.flatnonzero(rollout.real[:, e]):
                flags = bool(rollout.terminated[t, e]), bool(rollout.truncated[t, e])
                rows[e].append((tuple(rollout.raw_obs[t, e]), rollout.rewards[t, e], *flags))
        for (t, e), obs in zip(rollout.final_at, rollout.final_obs, strict=True):
            assert rollout.real[t, e]
            ends[e].append(tuple(obs))
    for e in range(E):
        serial = serial_rows(e, len(rows[e]))
        assert rows[e] == [(tuple(o), r, a, b) for o, r, _, a, b in serial]
        assert ends[e] == [tuple(following) for _, _, following, a, b in serial if b and not a]


class Typed(gym.vector.VectorWrapper):
    """Ends of episodes as another type, and the autoreset mode by its name."""

    def __init__(self, envs, dtype):
        super().__init__(envs)
        self.dtype = dtype
        self.metadata = envs.metadata | {"autoreset_mode": envs.metadata["autoreset_mode"].value}

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.env.step(actions)
        return obs, rewards, terminated.astype(self.dtype), truncated.astype(self.dtype), infos


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float32])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_ends_of_episodes_may_be_numbers_and_the_autoreset_mode_its_name(mode, dtype):
    config = tm.Config(hidden=(), total_steps=60, rollout_steps=20)
    assert same(tm.train(Typed(counters(2, mode), dtype), config), tm.train(counters(2, mode), config))


@pytest.mark.parametrize("mode", list(AutoresetMode))
@given(E=st.integers(1, 3), n_steps=st.integers(1, 12), normalized=st.booleans())
def test_advantages_are_those_of_a_serial_loop_with_each_rows_own_next_observation(mode, E, n_steps, normalized):
    envs = counters(E, mode)
    state, runner = start(envs)
    if normalized:
        state = state._replace(obs_stats=tm.RunningStats(3.0, np.array([1.0, 2.0]), np.array([2.0, 5.0])))
    rng = np.random.default_rng(0)
    state = state._replace(phi=np.array([0.7, -0.3, 0.1]))
    V = lambda obs: tm.normalize(state.obs_stats, np.asarray(obs, float)[None])[0] @ state.phi[:2] + 0.1  # noqa: E731
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, rng, n_steps)
    adv, returns = tm._advantages(state, rollout, rollout.rewards)
    gamma, lam = state.config.gamma, state.config.lam
    for e in range(E):
        at = np.flatnonzero(rollout.real[:, e])
        serial = serial_rows(e, len(at))
        for i, t in enumerate(at):
            total = 0.0
            for k in range(i, len(at)):
                obs, reward, following, terminated, truncated = serial[k]
                total += (gamma * lam) ** (k - i) * (reward + gamma * V(following) * (not terminated) - V(obs))
                if terminated or truncated:
                    break
            assert isclose(adv[t, e], total, rtol=1e-12)
            assert isclose(returns[t, e], total + V(serial[i][0]), rtol=1e-12)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@given(E=st.integers(1, 3), total_steps=st.integers(3, 60), rollout_steps=st.integers(1, 20))
def test_counted_steps_episodes_and_returns_are_those_that_happened(mode, E, total_steps, rollout_steps):
    envs = counters(E, mode)
    config = tm.Config(hidden=(), total_steps=total_steps, rollout_steps=rollout_steps, stop_when_solved=False)
    state = tm.train(envs, config)
    taken = [len(env.seen) for env in envs.envs]
    assert state.steps == sum(taken)
    assert total_steps - E < state.steps <= total_steps
    finished = [episode for e, n in enumerate(taken) for episode in serial_episodes(e, n)]
    assert state.episodes == len(finished)
    assert sorted(zip(state.returns, state.lengths, strict=True)) == sorted(finished)


def test_the_returns_that_are_kept_are_those_of_the_last_100_episodes_in_order():
    envs = counters(1, AutoresetMode.DISABLED)
    state = tm.train(envs, tm.Config(hidden=(), total_steps=1500, rollout_steps=100, stop_when_solved=False))
    finished = serial_episodes(0, 1500)
    assert len(finished) > 150 and len({*finished}) > 10
    assert list(zip(state.returns, state.lengths, strict=True)) == finished[-100:]


def test_each_update_goes_on_with_random_numbers_of_its_own_and_so_does_a_resume():
    seen, config = [], tm.Config(hidden=(), total_steps=30, rollout_steps=10, stop_when_solved=False)
    state = tm.train(counters(1, AutoresetMode.DISABLED), config, callback=lambda s, *_: seen.append(s.rng_state))
    more = config._replace(total_steps=40)
    seen += [tm.train(counters(1, AutoresetMode.DISABLED), more, state=state).rng_state]
    seen += [tm.init_state("", state.policy, config, 0).rng_state]
    assert len({str(each) for each in seen}) == 5


def test_environments_start_from_seeds_drawn_with_the_random_numbers_of_the_run():
    envs = gym.make_vec("CartPole-v1", 3, vectorization_mode="sync")
    policy = tm.make_policy(envs.single_observation_space, envs.single_action_space, ())
    state = tm.init_state("", policy, tm.Config(hidden=()), 0)
    fixed = envs, policy, state.theta, state.obs_stats, None
    one, two, again = (tm.collect(*fixed, np.random.default_rng(n), 1)[0].raw_obs for n in (0, 1, 0))
    assert (one == again).all() and (one != two).all()


def test_the_discounted_return_that_scales_rewards_starts_anew_with_each_episode():
    envs = counters(2, AutoresetMode.NEXT_STEP)
    state, runner = start(envs)
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 30, 0.9)
    for e in range(2):
        at, running = np.flatnonzero(rollout.real[:, e]), 0.0
        for t, (_, reward, _, terminated, truncated) in zip(at, serial_rows(e, len(at)), strict=True):
            running = 0.9 * running + reward
            assert isclose(rollout.discounted[t, e], running)
            running *= not (terminated or truncated)


class Loud(SyncVectorEnv):
    """Pays for steps that only reset, and says that they end an episode."""

    def step(self, actions):
        resets = self._autoreset_envs.copy()
        obs, rewards, terminated, truncated, infos = super().step(actions)
        return obs, rewards + 7.0 * resets, terminated | resets, truncated | resets, infos


def test_what_is_said_of_a_step_that_only_resets_counts_nowhere():
    makes, rows = [lambda i=i: Counter(i) for i in range(3)], []
    for envs in (counters(3, AutoresetMode.NEXT_STEP), Loud(makes, autoreset_mode=AutoresetMode.NEXT_STEP)):
        state, runner = start(envs)
        rows.append(tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 30))
    assert not rows[0][0].real.all() and same(*rows)


def test_actions_are_stored_as_sampled_and_the_environment_gets_the_clipped_copy():
    envs = counters(3, AutoresetMode.SAME_STEP)
    state, runner = start(envs, tm.Config(hidden=(), init_std=1.0))
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 40)
    assert (np.abs(rollout.actions) > 1).any()
    sent = np.stack([env.seen for env in envs.envs], axis=1)
    assert sent.dtype == np.float32
    assert (sent == np.clip(rollout.actions, -1, 1).astype(np.float32)).all()


@given(seeds, st.integers(1, 3), st.sampled_from(["float64", "float32"]))
def test_the_ratio_at_old_is_one_with_observation_normalisation_on(seed, E, dtype):
    config = tm.Config(hidden=(5,), dtype=dtype)
    envs = counters(E, AutoresetMode.NEXT_STEP)
    state, runner = start(envs, config, seed)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        rollout, runner = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, rng, 20)
        obs, mu, actions = (a.reshape(20 * E, -1) for a in (rollout.obs, rollout.mu, rollout.actions))
        new = tm.log_prob(state.policy, tm.forward(state.policy, state.theta, obs), actions)
        log_ratio = new - tm.log_prob(state.policy, mu, actions)
        # float32: eps x (5 + 2) roundings x |z| / sigma, for |z| <= 6
        assert np.abs(log_ratio).max() <= (1e-12 if dtype == "float64" else 1e-4)
        state = tm.learn(state, rollout)[0]
    assert state.obs_stats.count > 0


def test_the_observation_statistics_stay_as_they_are_during_a_rollout_and_follow_it():
    envs = counters(2, AutoresetMode.NEXT_STEP)
    state, runner = start(envs)
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 30)
    assert (rollout.obs == rollout.raw_obs.clip(-10, 10)).all()
    state, info, _ = tm.learn(state, rollout)
    assert abs(info.surrogate_old) <= 1e-12 * np.abs(rollout.rewards).max()  # the advantages were centred
    after = state.obs_stats
    rows = rollout.raw_obs[rollout.real]
    assert after.count == len(rows)
    assert allclose(after.mean, rows.mean(axis=0))
    assert allclose(after.m2 / after.count, rows.var(axis=0))


@given(seeds, st.lists(st.integers(1, 20), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_running_statistics_are_those_of_all_rows_however_they_were_split(seed, parts, offset):
    rng, stats = np.random.default_rng(seed), tm.RunningStats(0.0, np.zeros(3), np.zeros(3))
    rows = offset + rng.normal(size=(sum(parts), 3))
    for part in np.split(rows, np.cumsum(parts)[:-1]):
        stats = tm.update_stats(stats, part)
    scale = EPS * len(rows) * (abs(offset) + 10)
    assert allclose(stats.mean, rows.mean(axis=0), rtol=0, atol=10 * scale)
    assert allclose(stats.m2 / stats.count, rows.var(axis=0), rtol=1e-9, atol=100 * scale)


def line(limit=400.0):
    """An environment that observes 0, 100, 200, ...: far out of the range of a normalised observation."""

    class Line(Counter):
        observation_space = spaces.Box(-np.inf, np.inf, (1,))

        def _obs(self):
            return np.array([min(100.0 * self.step_in_episode, limit)], np.float32)

    return SyncVectorEnv([Line], autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.parametrize("normalize_obs", [True, False])
def test_observations_are_normalised_and_cut_at_ten_deviations_only_if_asked_for(normalize_obs):
    envs = line()
    state, runner = start(envs, tm.Config(hidden=(), normalize_obs=normalize_obs))
    rng = np.random.default_rng(0)
    rollout, runner = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, rng, 20)
    assert (rollout.obs == rollout.raw_obs).all()  # no statistics yet
    state = tm.learn(state, rollout)[0]
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, rng, 20)
    if normalize_obs:
        mean, deviation = state.obs_stats.mean, np.sqrt(state.obs_stats.m2 / state.obs_stats.count)
        assert allclose(rollout.obs, (rollout.raw_obs - mean) / deviation, rtol=1e-6, atol=1e-9)
        assert tm.normalize(state.obs_stats, np.array([[1e9]])) == 10
    else:
        assert (rollout.obs == rollout.raw_obs).all()


@pytest.mark.parametrize("normalize_reward", [True, False])
def test_one_iteration_scales_rewards_fits_the_value_function_and_reports_what_it_explains(normalize_reward):
    envs = counters(2, AutoresetMode.SAME_STEP)
    state, runner = start(envs, tm.Config(hidden=(8,), normalize_reward=normalize_reward, cg_tol=1e-4))  # in float64
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 100)
    after, info, explained = tm.learn(state, rollout)
    scale = 1 / np.sqrt(rollout.discounted.var() + 1e-8) if normalize_reward else 1.0
    adv, returns = tm._advantages(state, rollout, rollout.rewards * scale)
    assert isclose(explained, 1 - adv.var() / returns.var(), rtol=1e-9)
    obs, actions, mu, adv, returns = (  # environment by environment
        each.swapaxes(0, 1).reshape(200, *each.shape[2:])
        for each in (rollout.obs, rollout.actions, rollout.mu, adv, returns)
    )
    before, fitted = (tm.forward(state.value, phi, obs)[:, 0] for phi in (state.phi, after.phi))
    assert np.square(fitted - returns).mean() < np.square(before - returns).mean()
    batch = tm.Batch(obs, actions, adv - adv.mean(), mu)
    theta, expected = tm.trpo_update(state.policy, state.theta, batch, state.config)
    assert allclose(after.theta, theta, rtol=1e-9, atol=1e-12)
    assert isclose(info.surrogate, expected.surrogate, rtol=1e-9)


def test_the_value_function_also_learns_from_earlier_rollouts_their_returns_by_the_value_function_of_now():
    envs = counters(2, AutoresetMode.SAME_STEP)
    state, runner = start(envs, tm.Config(hidden=(8,)))
    rng, rollouts = np.random.default_rng(0), []
    for _ in range(3):
        now = envs, state.policy, state.theta, state.obs_stats
        rollout, runner = tm.collect(*now, runner, rng, 30)
        rollouts.append(rollout)
        before, (state, *_) = state, tm.learn(state, rollout, earlier=rollouts[:-1])
    stats, variance = before.obs_stats, state.reward_stats.m2 / state.reward_stats.count
    obs, returns = [], []
    for age, each in enumerate(reversed(rollouts)):
        deviation = np.sqrt(stats.m2 / stats.count + 1e-8)
        seen, last = (((raw - stats.mean) / deviation).clip(-10, 10) for raw in (each.raw_obs, each.last_obs))
        V, after = (dense_forward(before.value, before.phi, x.reshape(-1, 2)).reshape(-1, 2) for x in (seen, last))
        after = np.concatenate([V[1:], after])
        for (t, e), final in zip(each.final_at, each.final_obs, strict=True):
            final = ((final - stats.mean) / deviation).clip(-10, 10)
            after[t, e] = dense_forward(before.value, before.phi, final[None])[0, 0]
        ends = each.terminated, each.truncated, before.config.gamma, before.config.lam
        G = tm.gae(each.rewards / np.sqrt(variance + 1e-8), V, after, *ends)[1]
        # of the newest the first, fourth, ... row, of the one before the second, fifth, ...
        obs.append(np.concatenate([seen[:, 0], seen[:, 1]])[age::3])
        returns.append(np.concatenate([G[:, 0], G[:, 1]])[age::3])
    assert not np.allclose(obs[2][:9], rollouts[0].obs[2:29:3, 0])  # the statistics have moved since
    expected = tm.fit_value(before.value, before.phi, np.concatenate(obs), np.concatenate(returns), before.config)
    assert allclose(state.phi, expected, rtol=1e-7, atol=1e-9)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 12))
def test_each_row_of_n_rollouts_is_fitted_once_in_n_updates_and_all_environments_are_in_each_fit_alike(E, n, n_steps):
    numbers, rollouts, fitted, learn, fit_value = count(), [], [], tm.learn, tm.fit_value

    class Numbered(Counter):
        """Observes a number that no other observation has."""

        observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)

        def _obs(self):
            return np.array([next(numbers)], np.float64)

    def noted(state, rollout, *rest):
        rollouts.append(rollout.raw_obs[..., 0])
        return learn(state, rollout, *rest)

    def noted_fit(value, phi, obs, *rest):
        fitted.append(obs[:, 0])
        return fit_value(value, phi, obs, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tm, "learn", noted)
        patch.setattr(tm, "fit_value", noted_fit)
        sizes = {"num_envs": E, "rollout_steps": E * n_steps, "total_steps": E * n_steps * 3 * n}
        tm.train(Numbered, tm.Config(hidden=(4,), normalize_obs=False, value_rollouts=n, **sizes))
    assert len(fitted) == len(rollouts) == 3 * n
    for k in range(n - 1, 2 * n):
        rows = np.concatenate(fitted[k : k + n])
        assert np.isin(rows, rollouts[k]).sum() == rollouts[k].size and np.isin(rollouts[k], rows).all()
        for age in range(n):
            assert np.isin(fitted[k], rollouts[k - age]).sum() == len(range(age, E * n_steps, n))
        of_each = [np.isin(fitted[k], [each[:, e] for each in rollouts]).sum() for e in range(E)]
        assert max(of_each) - min(of_each) <= n and len(fitted[k]) == E * n_steps


@given(seeds, st.integers(1, 3), st.integers(0, 3))
def test_the_bits_of_a_product_do_not_depend_on_a_rows_neighbours_in_the_batch(seed, groups_, extra):
    """Rows of whole blocks come out the same whatever follows them: the first step to exact data parallelism."""
    case = fixed_case("gaussian", 64 * groups_ + extra, seed)
    whole = tm.forward(*case[:3])[: 64 * groups_]
    assert (tm.forward(case.policy, case.theta, case.obs[: 64 * groups_]) == whole).all()


def test_a_feature_that_was_constant_is_not_blown_up_when_it_moves():
    stats = tm.update_stats(tm.RunningStats(0.0, np.zeros(1), np.zeros(1)), np.full((50, 1), 3.0))
    assert tm.normalize(stats, np.array([[3.0]])) == 0
    assert abs(tm.normalize(stats, np.array([[3.0001]]))) <= 1.001


@pytest.mark.parametrize(("kl_schedule", "left"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("constant", [1.0] * 4)])
def test_the_trust_region_falls_linearly_to_nothing_over_total_steps_or_stays(kl_schedule, left, monkeypatch):
    seen, update = [], tm.trpo_update
    monkeypatch.setattr(tm, "trpo_update", lambda *args: seen.append(args[-1].max_kl) or update(*args))
    config = tm.Config(
        total_steps=400, rollout_steps=100, max_kl=0.03, kl_schedule=kl_schedule, kl_memory=0.0, hidden=(4,)
    )
    state = tm.train(gym.make("CartPole-v1"), config)
    assert allclose(seen, 0.03 * np.array(left)) and state.config == config


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_the_trust_region_shrinks_with_advantages_and_returns_that_are_smaller_than_before(factors, memory):
    """Before: the plain mean of the rollouts while these are few, then one that forgets if memory < 1."""
    envs = counters(2, AutoresetMode.SAME_STEP)
    config = tm.Config(hidden=(4,), normalize_reward=False, kl_schedule="constant", kl_memory=memory)
    state, runner = start(envs, config)
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 30)
    theta, phi = state.theta, np.zeros_like(state.phi)
    seen, powers, update = [], [], tm.trpo_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tm, "trpo_update", lambda *args: seen.append(args[-1].max_kl) or update(*args))
        for factor in (1.0, *factors):  # with V = 0 the advantages, and the returns, scale with the rewards
            scaled = rollout._replace(rewards=factor * rollout.rewards)
            state, *_ = tm.learn(state._replace(theta=theta, phi=phi), scaled)
            powers.append(state.powers)
    squares, window = np.square([1.0, *factors]), round(1 / (1 - memory)) if memory < 1 else np.inf
    _, returns = tm._advantages(state._replace(phi=phi), rollout, rollout.rewards)
    assert isclose(powers[0][1], returns[rollout.real].var(), rtol=1e-9)
    for n, (max_kl, power) in enumerate(zip(seen, powers, strict=True), 1):
        age = np.arange(n)[::-1].clip(0, max(n - window, 0))
        weights = memory**age / min(n, window)
        assert allclose(power, weights @ squares[:n] * np.array(powers[0]), rtol=1e-9)
        assert isclose(max_kl, state.config.max_kl * min(1.0, squares[n - 1] / (weights @ squares[:n])), rtol=1e-9)


@given(st.floats(0.001, 2.0), st.floats(0.001, 2.0))
def test_the_trust_region_stays_while_either_advantages_or_returns_are_as_large_as_before(adv, variance):
    state = start(counters(2, AutoresetMode.SAME_STEP), tm.Config(hidden=(4,), kl_memory=1.0))[0]
    state = state._replace(powers=(4.0, 9.0), updates=10**9)  # means that one more rollout moves by 1e-8 at most
    max_kl, _ = tm._max_kl_now(state, np.full(10, 2.0 * adv**0.5), 9.0 * variance)
    assert isclose(max_kl, state.config.max_kl * min(1.0, max(adv, variance)), rtol=1e-8)


def test_rollouts_without_any_advantage_leave_the_trust_region_alone():
    state = start(counters(2, AutoresetMode.SAME_STEP), tm.Config(hidden=(4,), kl_memory=0.9))[0]
    assert tm._max_kl_now(state, np.zeros(10), 0.0) == (state.config.max_kl, (0.0, 0.0))
    later = state._replace(powers=(4.0, 2.0), updates=1000)
    assert tm._max_kl_now(later, np.zeros(10), 0.0) == (state.config.max_kl, (0.9 * 4.0, 0.9 * 2.0))


def test_means_that_there_are_none_of_yet_begin_with_the_rollout():
    """As after the load of a checkpoint without: else they would stay small for as long as it had trained."""
    state = start(counters(2, AutoresetMode.SAME_STEP), tm.Config(hidden=(4,)))[0]._replace(updates=1000)
    assert tm._max_kl_now(state, np.full(10, 3.0), 4.0) == (state.config.max_kl, (9.0, 4.0))


def test_the_trust_region_is_not_empty_after_total_steps():
    state = start(counters(2, AutoresetMode.SAME_STEP), tm.Config(hidden=(4,), total_steps=100))[0]
    for steps in (99, 100, 1000):
        assert tm._max_kl_now(state._replace(steps=steps), np.ones(10), 1.0)[0] == 0.01 * state.config.max_kl


@given(st.sampled_from([0.1, 1.0, 1000.0]))
def test_the_scale_of_the_rewards_does_not_change_the_policy_update(factor):
    """Reward normalisation is a scale too, and the step depends on none."""
    envs = counters(2, AutoresetMode.SAME_STEP)
    state, runner = start(envs, tm.Config(hidden=(4,), normalize_reward=False))
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 30)
    state = state._replace(phi=np.zeros_like(state.phi))
    one, other = (tm.learn(state, rollout._replace(rewards=rollout.rewards * f))[0].theta for f in (1.0, factor))
    assert allclose(one, other, rtol=0, atol=1e-9 * np.abs(one - state.theta).max() + 1e-12)


def test_constant_advantages_are_centred_to_zero_and_not_to_their_rounding():
    assert (tm._centre(np.full(1000, 0.1)) == 0).all()
    assert (tm._centre(np.full(7, 1e300)) == 0).all()
    assert (tm._centre(np.array([3.0])) == 0).all()
    adv = np.random.default_rng(0).normal(size=50)
    assert (tm._centre(adv) == adv - adv.mean()).all()


def test_advantages_that_differ_by_more_than_the_mean_can_err_are_kept_however_many_they_are():
    adv = 1 + np.random.default_rng(0).normal(size=1_000_000).astype(np.float32) / 100
    assert (tm._centre(adv) == adv - adv.mean()).all()
    constant = np.full(1_000_000, 0.1, np.float32)  # the mean of which, by halves, is off by a few eps
    assert (tm._centre(constant) == 0).all()


# ====================================================================================================== E10: vine
class Finite(gym.Env):
    """An MDP to step in, from its own generator: u below the cumulative chances."""

    def __init__(self, mdp):
        self.mdp, (S, A) = mdp, mdp.r.shape
        self.observation_space, self.action_space = spaces.Discrete(S), spaces.Discrete(A)

    def _draw(self, chances):
        return int(min(np.searchsorted(np.cumsum(chances), self.np_random.random(), side="right"), len(chances) - 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self._draw(self.mdp.start)
        return self.state, {}

    def step(self, action):
        reward = self.mdp.r[self.state, action]
        self.state = self._draw(self.mdp.P[self.state, action])
        return self.state, reward, False, False, {}


def repeated_q(mdp, theta, config, n, seed):
    """Q (n, K) by n sets of branches from one state, closed with the exact V; the state, and the actions (n, K)."""
    envs = SyncVectorEnv([lambda: Finite(mdp)], autoreset_mode=AutoresetMode.DISABLED)
    state, runner = start(envs, config, seed)
    pi = table(state.policy, theta)
    V = (pi * mdp.solve(pi)[1]).sum(axis=1)
    state = state._replace(theta=theta, phi=np.append(V, 0.0))
    now, rng = (envs, state.policy, theta, state.obs_stats), np.random.default_rng(seed)
    rollout, _ = tm.collect(*now, runner, rng, 2, 0.9, 1)
    branches = tm.branch(*now, rollout._replace(saved=rollout.saved * n), rng, config)
    q = tm._advantages(state, branches, branches.rewards)[1][0].reshape(n, -1)
    return q, rollout.raw_obs[rollout.saved[0][0], 0].argmax(), branches.actions[0, :, 0].reshape(n, -1)


@pytest.mark.slow
@given(seeds, st.integers(2, 4), st.sampled_from([1, 3, 6]), st.sampled_from([0.0, 0.7, 1.0]))
@settings(max_examples=8, phases=NO_SHRINKING)
def test_q_of_the_branches_is_unbiased_and_its_error_falls_as_one_over_the_root_of_their_number(seed, A, L, lam):
    rng, n = np.random.default_rng(seed), 2048
    mdp = MDP(rng.dirichlet(np.full(3, 3.0), (3, A)), rng.normal(size=(3, A)), np.full(3, 1 / 3), 0.9)
    policy, theta = softmax_policy(mdp, rng, scale=0.5)
    config = tm.Config(hidden=(), gamma=mdp.gamma, lam=lam, vine_actions=3, vine_steps=L)
    q, at, actions = repeated_q(mdp, theta, config, n, seed)
    pi = table(policy, theta)
    exact = mdp.solve(pi)[1][at]
    if A <= 3:
        assert (actions == np.arange(A)).all()
    else:  # samples of the policy
        chances = np.bincount(actions.ravel(), minlength=A) / actions.size
        assert (np.abs(chances - pi[at]) <= 5 / np.sqrt(actions.size)).all()
    error = q - exact[actions]
    assert (np.abs(error.mean(axis=0)) <= 5 * error.std(axis=0) / np.sqrt(n)).all()  # a chance of 6e-7 each
    means = error.reshape(n // 16, 16, -1).mean(axis=1)
    # a mean of 16 has a sixteenth of the mean square, which n / 16 of them tell to a relative sqrt(2 * 16 / n)
    assert abs((means**2).mean() / (error**2).mean() * 16 - 1) <= 5 * np.sqrt(32 / n)


@pytest.mark.slow
@given(seeds, st.integers(2, 5), st.sampled_from([2, 6]))
@settings(max_examples=6, phases=NO_SHRINKING)
def test_common_random_numbers_never_raise_the_variance_of_a_difference_where_more_noise_means_more_reward(seed, S, L):
    # Harris's inequality: two functions that rise with the same independent numbers have a covariance >= 0.  So it is
    # here: chances that do not depend on the state, rewards that rise with it, a policy that is the same everywhere.
    rng, n = np.random.default_rng(seed), 2000
    chances = np.sort(rng.dirichlet(np.ones(S)))
    P = np.tile(np.stack([chances[::-1], chances]), (S, 1, 1))  # the second action leads to higher states
    r = np.sort(rng.normal(size=S))[:, None] + np.array([0.0, 0.5])
    mdp = MDP(P, r, np.full(S, 1 / S), 0.9)
    config = tm.Config(hidden=(), gamma=0.9, lam=1.0, vine_steps=L)
    q, _, _ = repeated_q(mdp, np.zeros(2 * S + 2), config, n, seed)
    common, apart = q[:, 1] - q[:, 0], q[1:, 1] - q[:-1, 0]  # different sets of branches share nothing
    assert common.var() <= apart.var() * (
        1 + 5 * np.sqrt(8 / n)
    )  # a variance of n numbers is sure to sqrt(kurtosis / n)


@pytest.mark.slow
def test_common_random_numbers_lower_the_variance_of_q_differences_on_cartpole():
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")], autoreset_mode=AutoresetMode.DISABLED)
    state, runner = start(envs, tm.Config(vine_steps=10))
    now, rng, n = (envs, state.policy, state.theta, state.obs_stats), np.random.default_rng(0), 100
    rollout, _ = tm.collect(*now, runner, rng, 40, 0.995, 4)
    branches = tm.branch(*now, rollout._replace(saved=rollout.saved * n), rng, state.config)
    q = tm._advantages(state, branches, branches.rewards)[1][0].reshape(n, 4, 2)
    common, apart = q[:, :, 1] - q[:, :, 0], q[1:, :, 1] - q[:-1, :, 0]
    assert common.var(axis=0).mean() < 0.8 * apart.var(axis=0).mean()


class Walk(gym.Env):
    """A random walk that ends, by failure or time limit, and depends on the actions and on its own generator."""

    observation_space = spaces.Dict({"x": spaces.Box(-np.inf, np.inf, (1,)), "t": spaces.Discrete(9)})
    spec = None

    def __init__(self, action_space=None):
        self.action_space = spaces.Box(-1.0, 1.0, (2,)) if action_space is None else action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.normal(size=1), 0
        return self._obs(), {}

    def _obs(self):
        return {"x": self.x.astype(np.float32), "t": self.t}

    def step(self, action):
        assert self.action_space.contains(action)
        self.x = self.x + np.sum(action) + self.np_random.normal(size=1)  # and never in place
        self.t += 1
        return self._obs(), float(self.x[0]), bool(abs(self.x[0]) > 4), self.t >= 8, {}


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("action_space", [None, spaces.MultiDiscrete([2, 2]), spaces.Discrete(3, start=-1)])
@given(seed=seeds, n_saved=st.integers(1, 4), K=st.integers(2, 5), L=st.integers(1, 6))
@settings(max_examples=10)
def test_branches_are_what_copies_of_the_environments_do_under_the_same_actions(
    action_space, n_envs, seed, n_saved, K, L
):
    envs = SyncVectorEnv([lambda: Walk(action_space)] * n_envs, autoreset_mode=AutoresetMode.DISABLED)
    config = tm.Config(hidden=(), vine_actions=K, vine_steps=L)
    state, runner = start(envs, config, seed)
    now = envs, state.policy, state.theta, state.obs_stats
    rng = np.random.default_rng(seed)
    rollout, runner = tm.collect(*now, runner, rng, 9, 0.995, n_saved)
    for i, (t, _) in enumerate(rollout.saved):  # one in each stretch
        assert i * 9 // n_saved <= t < (i + 1) * 9 // n_saved
    before = [copy.deepcopy(vars(env)) for env in envs.envs]
    branches = tm.branch(*now, rollout, rng, config)
    for env, old in zip(envs.envs, before, strict=True):  # back where they were
        assert all(repr(vars(env)[k]) == repr(v) for k, v in old.items() if k != "_np_random")
        assert env.np_random.bit_generator.state == old["_np_random"].bit_generator.state

    every = None if action_space is None else all_actions(state.policy)
    K = len(every) if every is not None and len(every) <= K else K
    ends = dict(zip(branches.final_at, branches.final_obs, strict=True))
    flatten = lambda obs: spaces.flatten(envs.single_observation_space, obs)  # noqa: E731
    assert branches.rewards.shape == (L, n_saved * n_envs * K)
    for column in range(n_saved * n_envs * K):
        s, e, k = np.unravel_index(column, (n_saved, n_envs, K))
        t, saved = rollout.saved[s]
        env = Walk(action_space)
        tm.restore_env(env, saved[e])
        obs, running = rollout.raw_obs[t, e], True
        for i in range(L):
            assert branches.real[i, column] == running
            if not running:
                continue
            assert (branches.raw_obs[i, column] == obs).all()
            action = tm._env_actions(state.policy, branches.actions[i, column][None])[0]
            if i == 0 and every is not None and len(every) == K:
                assert (branches.actions[0, column] == every[k]).all()
            if i == 0:  # the noise of the environment is new, and the same for the K branches
                first = column - k
                noise = branches.rewards[0, column] - obs[-1] - np.sum(action)
                other = tm._env_actions(state.policy, branches.actions[0, first][None])[0]
                assert isclose(noise, branches.rewards[0, first] - obs[-1] - np.sum(other), rtol=0, atol=1e-12)
            reached = branches.rewards[i, column]
            failed, over = abs(reached) > 4, int(obs[:9].argmax()) + 1 >= 8
            running = not (failed or over)
            assert (branches.terminated[i, column], branches.truncated[i, column]) == (failed, over)
            obs = flatten({"x": np.array([reached], np.float32), "t": min(int(obs[:9].argmax()) + 1, 8)})
            assert ((i, column) in ends) == (over and not failed)
            if over and not failed:
                assert (ends[i, column] == obs).all()
        assert not running or (branches.last_obs[column] == obs).all()


class Pickling(Walk, EzPickle):
    """As MuJoCo's and Box2D's classes are: a deepcopy calls the constructor again."""

    def __init__(self):
        Walk.__init__(self)
        EzPickle.__init__(self)


def transitions(env, actions):
    """What a plain loop sees, resets included, as bytes."""
    for action in actions:
        obs, reward, terminated, truncated, _ = env.step(action)
        yield (
            spaces.flatten(env.observation_space, obs).tobytes() + repr((float(reward), terminated, truncated)).encode()
        )
        if terminated or truncated:
            yield spaces.flatten(env.observation_space, env.reset()[0]).tobytes()


CLASSIC = ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0"]
TOY_TEXT_NAMES = ("FrozenLake", "CliffWalking", "Taxi", "Blackjack")
TOY_TEXT = [max(id for id in gym.registry if id.startswith(name + "-v")) for name in TOY_TEXT_NAMES]
MUJOCO = ["Hopper-v5", "HalfCheetah-v5", "Ant-v5", "Humanoid-v5", "Reacher-v5", "InvertedPendulum-v5"]


@pytest.mark.parametrize("make", [*CLASSIC, *TOY_TEXT, *MUJOCO, Walk, Pickling])
def test_a_restored_environment_repeats_its_next_100_transitions_bit_for_bit(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its log
    if make in MUJOCO:
        pytest.importorskip("mujoco", reason="needs the extra mujoco")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a newer version of an environment
        env = gym.wrappers.FrameStackObservation(gym.make(make), 2) if isinstance(make, str) else make()
        env.reset(seed=1)
        env.action_space.seed(1)
        actions = [env.action_space.sample() for _ in range(170)]
        list(transitions(env, actions[:20]))
        saved = tm.save_env(env)
        expected = list(transitions(env, actions[20:120]))
        for elsewhere in (0, 50):
            list(transitions(env, actions[120 : 120 + elsewhere]))
            tm.restore_env(env, saved)
            assert list(transitions(env, actions[20:120])) == expected


def test_a_deepcopy_of_an_environment_that_pickles_by_its_constructor_is_another_environment():
    env = Pickling()
    env.reset(seed=1)
    assert not hasattr(copy.deepcopy(env), "x")


class Secretive(Walk):
    """Keeps a part of its state where no copy of the environment reaches it."""

    def step(self, action):
        Secretive.secret = not getattr(Secretive, "secret", False)
        self.x = self.x + Secretive.secret
        return super().step(action)


class Locked(Walk):
    """Holds what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Reborn(Walk):
    """Becomes another one at each reset, where no copy of the environment reaches it."""

    def reset(self, **options):
        Reborn.drift = getattr(Reborn, "drift", 0.0) + 0.1
        return super().reset(**options)

    def step(self, action):
        self.x = self.x + self.drift
        obs, reward, *_, info = super().step(action)
        return {**obs, "t": 1}, reward, False, False, info  # and its episodes have no end


class Sealed(Walk):
    """Does not let its generator be replaced."""

    np_random = property(lambda self: self._np_random)


@pytest.mark.parametrize("env", [Secretive, Locked, Reborn, Sealed])
def test_an_environment_that_cannot_be_restored_is_refused_by_vine_in_one_sentence(env):
    with pytest.raises(ValueError, match=r"^vine sampling needs .* that can be saved and restored, not .*: .") as error:
        tm.train(env, tm.Config(sampling="vine", total_steps=10_000))
    assert "\n" not in str(error.value)


def test_the_check_before_vine_leaves_the_environment_as_it_was():
    env = gym.wrappers.RecordEpisodeStatistics(Walk())
    env.reset(seed=5)
    before = tm._physics(env), [repr(vars(layer)) for layer in tm._layers(env)]
    state = env.np_random.bit_generator.state
    tm._check_restorable(env)
    assert env.np_random.bit_generator.state == state and env.episode_count == 0
    hide = lambda text: re.sub("0x[0-9A-Fa-f]+", "", text)  # noqa: E731
    assert [hide(repr(vars(layer))) for layer in tm._layers(env)] == [hide(text) for text in before[1]]


def test_branches_share_their_random_numbers_within_a_state_and_with_no_other():
    class Noise(gym.Env):
        observation_space, action_space = spaces.Box(0, 1, (1,), np.float64), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1), {}

        def step(self, action):
            return self.np_random.random(1), 0.0, False, False, {}

    envs = SyncVectorEnv([Noise] * 2, autoreset_mode=AutoresetMode.DISABLED)
    state, runner = start(envs, tm.Config(hidden=(4,), vine_steps=1))
    now, rng = (envs, state.policy, state.theta, state.obs_stats), np.random.default_rng(0)
    rollout, _ = tm.collect(*now, runner, rng, 30, 0.995, 30)
    seen = tm.branch(*now, rollout, rng, state.config).last_obs.reshape(60, 2)
    assert (seen[:, 0] == seen[:, 1]).all()
    assert len(set(seen[:, 0])) == 60


def test_branches_start_at_other_steps_in_each_rollout():
    """Not at multiples of a length that the episodes may share."""
    envs = SyncVectorEnv([Walk], autoreset_mode=AutoresetMode.DISABLED)
    state, runner = start(envs)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        rollout, runner = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, rng, 8, 0.995, 2)
        seen |= {t for t, _ in rollout.saved}
    assert seen == set(range(8))


def test_an_environment_that_breaks_in_the_check_before_vine_is_closed_and_the_state_kept():
    closed = []

    class Broken(Walk):
        def step(self, action):
            raise RuntimeError("no power")

        def close(self):
            closed.append(1)

    with pytest.raises(ValueError, match="no power") as error:
        tm.train(Broken, tm.Config(sampling="vine", total_steps=10_000, num_envs=2))
    assert len(closed) == 2 and error.value.state.steps == 0


@pytest.mark.slow
def test_vine_refuses_environments_it_cannot_reach_and_fewer_steps_than_an_update_takes():
    config = tm.Config(sampling="vine", total_steps=10_000)
    for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
        with pytest.raises(ValueError, match="autoreset_mode DISABLED"):
            tm.train(counters(2, mode), config)
    with pytest.raises(ValueError, match="autoreset_mode DISABLED"):
        tm.train(gym.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point"), config)
    config = config._replace(num_envs=3, rollout_steps=10, vine_states=5, vine_steps=7, vine_actions=4)
    with pytest.raises(ValueError, match=r"^total_steps must be at least the 177 "):  # 9 + 6 * 4 * 7
        tm.train(Walk, config._replace(total_steps=176))
    assert tm.train(Walk, config._replace(total_steps=177)).updates == 1


@pytest.mark.parametrize("action_space", [None, spaces.MultiDiscrete([2, 2])])
def test_every_step_of_every_branch_is_counted_and_no_more_than_total_steps(action_space):
    taken = []

    class Counting(Walk):
        def step(self, action):
            taken.append(1)
            return super().step(action)

    config = tm.Config(sampling="vine", rollout_steps=40, vine_states=8, vine_steps=5, hidden=(4,), total_steps=1000)
    counted = []

    def callback(state, info, explained):
        counted.append((state.steps, len(taken)))

    state = tm.train(lambda: Counting(action_space), config, callback=callback)
    assert state.updates >= 1000 // (40 + 8 * 4 * 5)
    assert len({real - steps for steps, real in counted}) == 1  # beyond the check before training, none is missed
    assert 1000 - (40 + 8 * 4 * 5) < state.steps <= 1000
    assert state.episodes > 10 and all(1 <= length <= 8 for length in state.lengths)  # those of the trajectories


@pytest.mark.parametrize("action_space", [None, spaces.Discrete(3)])
def test_with_branches_the_policy_learns_from_their_first_steps_and_the_value_function_from_all_others(action_space):
    envs = SyncVectorEnv([lambda: Walk(action_space)] * 2, autoreset_mode=AutoresetMode.DISABLED)
    state, runner = start(envs, tm.Config(hidden=(8,), vine_steps=6))
    now, rng = (envs, state.policy, state.theta, state.obs_stats), np.random.default_rng(0)
    first, runner = tm.collect(*now, runner, rng, 30)
    rollout, _ = tm.collect(*now, runner, rng, 40, 0.995, 10)
    branches = tm.branch(*now, rollout, rng, state.config)
    after, info, _ = tm.learn(state, rollout, branches, [first])
    scale = 1 / np.sqrt(rollout.discounted.var() + 1e-8)
    q = tm._advantages(state, branches, branches.rewards * scale)[1]
    K, mu, actions = (3 if action_space else 4), branches.mu[0], branches.actions[0]
    pi = scipy.special.softmax(mu, axis=1)[np.arange(len(mu)), actions[:, 0]] if action_space else 1 / K
    V = np.repeat((pi * q[0]).reshape(-1, K).sum(axis=1), K)
    batch = tm.Batch(branches.obs[0], actions, q[0] - V, mu, K * pi, K)
    theta, expected = tm.trpo_update(state.policy, state.theta, batch, state.config)
    assert allclose(after.theta, theta, rtol=1e-9, atol=1e-12)
    assert isclose(info.surrogate, expected.surrogate, rtol=1e-9)
    assert isclose(info.adv_largest, np.abs(q[0] - V).max(), rtol=1e-9)
    later = branches.real[1:]
    rows = [(branches.obs[1:][later], q[1:][later])]  # and of each rollout every second
    for each in (first, rollout):
        returns = tm._advantages(state, each, each.rewards * scale)[1]
        both = np.concatenate([*each.obs.swapaxes(0, 1)]), np.concatenate([*returns.T])
        rows.insert(0, [x[int(each is first) :: 2] for x in both])
    obs, returns = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    phi = tm.fit_value(state.value, state.phi, obs, returns, state.config)
    assert allclose(after.phi, phi, rtol=1e-9, atol=1e-12)
    assert after.steps == 80 + branches.real.sum()


@pytest.mark.slow
def test_vine_repeats_bit_for_bit():
    config = tm.Config(sampling="vine", total_steps=4000, hidden=(8,), vine_states=16)
    one, other = (tm.train(Walk, config, seed=3) for _ in range(2))
    assert same(one, other) and one.updates > 1


# ======================================================================================================== spaces
ACTION_SPACES = [
    spaces.Box(-1, 1, (2, 3)),
    spaces.Box(-np.inf, np.inf, (1,), np.float64),
    spaces.Box(0, 9, (2,), np.int32),
    spaces.Box(-1.0, 1.0, ()),
    spaces.Discrete(3, start=5),
    spaces.Discrete(1),
    spaces.MultiDiscrete([2, 3, 4]),
    spaces.MultiDiscrete([[2, 3], [4, 5]]),
    spaces.MultiBinary(4),
    spaces.MultiBinary((2, 2)),
]
OBSERVATION_SPACES = [
    spaces.Box(-1, 1, (2, 3)),
    spaces.Box(0, 255, (4,), np.uint8),
    spaces.Box(-1.0, 1.0, ()),
    spaces.Discrete(4, start=-1),
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiBinary((2, 2)),
    spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Discrete(3)),
    spaces.Tuple([spaces.Discrete(2), spaces.Dict(c=spaces.Box(0, 1, (1,)))]),
]


def contains(space, action):
    return space.contains(np.asarray(action) if isinstance(space, spaces.Box) else action)


class Spaces(gym.Env):
    """Observes anything, takes anything, and insists that it is in the space."""

    spec = None

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space, self.observed = observation_space, action_space, []

    def _obs(self):
        self.observed.append(spaces.flatten(self.observation_space, self.observation_space.sample()))
        return spaces.unflatten(self.observation_space, self.observed[-1])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self._obs(), {}

    def step(self, action):
        assert contains(self.action_space, action), (action, self.action_space)
        self.t += 1
        return self._obs(), float(self.t), False, self.t == 3, {}


@pytest.mark.parametrize("action_space", ACTION_SPACES, ids=str)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_action_space_gets_actions_that_it_contains(action_space, mode):
    envs = SyncVectorEnv([lambda: Spaces(spaces.Box(-1, 1, (2,)), action_space)] * 2, autoreset_mode=mode)
    state = tm.train(envs, tm.Config(hidden=(3,), total_steps=40, rollout_steps=20))
    assert state.updates >= 2
    single = tm.act(state.policy, state.theta, np.zeros(2), state.obs_stats)
    assert contains(action_space, single)
    batch = tm.act(state.policy, state.theta, np.zeros((5, 2)), state.obs_stats, np.random.default_rng(0))
    assert len(batch) == 5
    assert all(contains(action_space, a) for a in batch)


@pytest.mark.parametrize("observation_space", OBSERVATION_SPACES, ids=str)
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_observation_space_is_seen_as_gymnasium_flattens_it(observation_space, mode):
    envs = SyncVectorEnv([lambda: Spaces(observation_space, spaces.Discrete(2))] * 2, autoreset_mode=mode)
    state, runner = start(envs, tm.Config(hidden=(3,)))
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 10)
    for e, env in enumerate(envs.envs):
        seen = [*rollout.raw_obs[:, e], rollout.last_obs[e], *rollout.final_obs]
        for flat in env.observed[:-1]:
            assert any((flat == obs).all() for obs in seen)


@pytest.mark.parametrize(
    "space", [spaces.Text(5), spaces.Sequence(spaces.Discrete(2)), spaces.Tuple([spaces.Discrete(2)])]
)
def test_an_action_space_that_is_not_supported_is_named_in_one_sentence(space):
    with pytest.raises(ValueError, match=r"action space .* is not supported: it must be Box, Discrete") as error:
        tm.make_policy(spaces.Box(-1, 1, (2,)), space)
    assert str(space) in str(error.value)


def test_an_observation_space_that_is_not_supported_is_named_in_one_sentence():
    space = spaces.Sequence(spaces.Discrete(2))
    with pytest.raises(ValueError, match=r"observation space .* is not supported") as error:
        tm.make_policy(space, spaces.Discrete(2))
    assert str(space) in str(error.value)


class Reusing(gym.Env):
    """Writes each observation into one and the same array."""

    observation_space, action_space = spaces.Box(-np.inf, np.inf, (1,)), spaces.Discrete(2)
    buffer = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.n, self.buffer = 0, np.zeros(1, np.float32) if self.buffer is None else self.buffer
        self.buffer[:] = 0
        return self.buffer, {}

    def step(self, action):
        self.n += 1
        self.buffer[:] = self.n
        return self.buffer, 1.0, False, self.n == 5, {}


def test_an_environment_that_reuses_its_observation_bootstraps_from_its_true_last_one():
    envs, made_here = tm._make_envs(Reusing, tm.Config(num_envs=3))
    assert made_here
    state, runner = start(envs)
    rollout, _ = tm.collect(envs, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 12)
    assert [obs.tolist() for obs in rollout.final_obs] == [[5.0]] * 6
    assert (rollout.raw_obs[:, 0, 0] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]).all()


@pytest.mark.parametrize("vector", ["sync", "async"])
def test_no_infos_are_gathered_of_the_environments_of_a_vector(vector):
    class Telling(Counter):
        def step(self, action):
            return *super().step(action)[:4], {"seen": len(self.seen)}

    envs, _ = tm._make_envs(Telling, tm.Config(num_envs=2, vector=vector))
    with contextlib.closing(envs):
        envs.reset()
        assert envs.step(np.zeros((2, 1), np.float32))[4] == {}


def test_an_environment_whose_steps_return_four_things_is_refused_in_one_sentence():
    class Old(Counter):
        def step(self, action):
            return super().step(action)[1:]

    with pytest.raises(ValueError, match=r"must return 5 things, .* got 4 from <Old instance>"):
        tm.train(Old, tm.Config(num_envs=2))


@pytest.mark.parametrize(("vector", "sizes"), [("own", [16, 8, 1]), ("sync", [4, 4, 4])])
def test_environments_that_step_as_one_are_16_in_all_ranks_by_default_and_others_4_in_each(vector, sizes, monkeypatch):
    for n_ranks, size in zip((1, 2, 20), sizes, strict=True):
        monkeypatch.setattr(tm, "_ranks", types.SimpleNamespace(size=n_ranks) if n_ranks > 1 else None)
        envs, _ = tm._make_envs("CartPole-v1", tm.Config(vector=vector))
        with contextlib.closing(envs):
            assert envs.num_envs == size


class Precise(Counter):
    """With observations in float64, which need no copy to be the policy's."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def _obs(self):
        return super()._obs().astype(np.float64)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_rollout_stays_as_it_is_where_vector_environments_reuse_their_observations(mode):
    envs = SyncVectorEnv([Precise, lambda: Precise(1)], copy=False, autoreset_mode=mode)
    state, runner = start(envs)
    now = envs, state.policy, state.theta, state.obs_stats
    rollout, runner = tm.collect(*now, runner, np.random.default_rng(0), 13)
    before = json.dumps(rollout, default=lambda x: np.asarray(x).tobytes().hex())
    tm.collect(*now, runner, np.random.default_rng(1), 10)
    assert json.dumps(rollout, default=lambda x: np.asarray(x).tobytes().hex()) == before


@pytest.mark.parametrize(
    ("dtype", "size", "step"),
    [("float32", 1e39, 0), ("float64", np.inf, 0), ("float64", np.nan, 0), ("float64", np.inf, 50)],
)
def test_observations_that_are_not_finite_in_the_type_of_the_policy_are_refused(dtype, size, step):
    """Also once there are statistics, and infinity would be cut to 10 deviations."""

    class Large(Precise):
        def _obs(self):
            return np.full(2, size if len(self.seen) == step else len(self.seen))

    with pytest.raises(ValueError, match="an observation with NaN or infinity"):
        tm.train(Large, tm.Config(dtype=dtype, hidden=(4,), num_envs=1, rollout_steps=40))


@pytest.mark.parametrize("env", [5, lambda: None, "NoSuchEnvironment-v0"])
def test_what_is_no_environment_is_refused_in_one_sentence(env, trained):
    for use in (lambda: tm.train(env), lambda: tm.evaluate(trained, env)):
        with pytest.raises(ValueError, match=r"environment|env must be"):
            use()


def test_a_callable_that_makes_the_same_environment_again_is_refused():
    env = Reusing()
    with pytest.raises(ValueError, match="a new environment at each call"):
        tm.train(lambda: env)


class Mortal(Counter):
    """Kills its process at step 100, if that is not the one that trains."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer = trainer

    def step(self, action):
        if len(self.seen) == 100 and os.getpid() != self.trainer:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


def test_the_end_of_an_environments_process_ends_training_with_what_was_learned():
    config = tm.Config(num_envs=2, vector="async", rollout_steps=60, hidden=(4,))
    with pytest.raises(RuntimeError, match="the process of an environment has ended") as caught:
        tm.train(functools.partial(Mortal, os.getpid()), config)
    assert caught.value.state.updates == 3
    assert not multiprocessing.active_children()


def test_processes_that_have_ended_are_closed_without_a_word():
    def end(*_):
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        return True

    assert tm.train("Pendulum-v1", tm.Config(vector="async", rollout_steps=60, hidden=(4,)), callback=end).updates == 1


class Unlucky(Counter):
    def step(self, action):
        raise self.salt


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium tells of the error as well
@pytest.mark.parametrize("error", [ConnectionResetError("lost"), EOFError("no more")])
def test_what_an_environment_raises_in_its_process_is_not_taken_for_the_end_of_it(error):
    config = tm.Config(num_envs=2, vector="async", hidden=(4,))
    with pytest.raises(type(error), match=str(error)):
        tm.train(functools.partial(Unlucky, error), config)


def test_spaces_that_are_not_supported_are_named_before_processes_are_started():
    class Listing(Counter):
        observation_space = spaces.Sequence(spaces.Discrete(2))

    with pytest.raises(ValueError, match=r"^observation space Sequence"):
        tm.train(Listing, tm.Config(vector="async"))


class Stuck(Counter):
    def close(self):
        raise RuntimeError("cannot close")


def test_an_environment_that_cannot_be_closed_takes_nothing_along():
    config = tm.Config(num_envs=2, total_steps=200, rollout_steps=100, hidden=(4,))
    with pytest.warns(UserWarning, match="cannot close"):
        state = tm.train(Stuck, config)
    assert state.updates == 2
    with pytest.warns(UserWarning, match="cannot close"):
        assert len(tm.evaluate(state, Stuck, 3)[0]) == 3

    def fail(state, *_):
        raise OSError("full")

    with pytest.warns(UserWarning, match="cannot close"), pytest.raises(OSError, match="full") as caught:
        tm.train(Stuck, config, callback=fail)
    assert caught.value.state.updates == 1


class Lasting(Walk):
    """Observes NaN where an episode terminates."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,))

    def _obs(self):
        return np.where((np.abs(self.x) > 4) & (self.t > 0), np.nan, self.x)


SAMPLING = [*(("single_path", mode) for mode in AutoresetMode), ("vine", AutoresetMode.DISABLED)]


@pytest.mark.parametrize(("sampling", "mode"), SAMPLING)
def test_what_is_observed_where_an_episode_terminates_is_of_no_account(sampling, mode):
    config = tm.Config(sampling=sampling, total_steps=4000, rollout_steps=200, vine_states=8, vine_steps=6, hidden=(4,))
    assert tm.train(SyncVectorEnv([Lasting] * 2, autoreset_mode=mode), config).episodes > 100


def test_environments_in_processes_of_their_own_give_the_bits_of_those_in_this_one():
    config = tm.Config(total_steps=2000, num_envs=3)
    here, there = (tm.train("CartPole-v1", config._replace(vector=vector), seed=2) for vector in ("sync", "async"))
    assert same(here._replace(config=None), there._replace(config=None))
    with pytest.raises(ValueError, match="needs an id, or a callable"):
        tm.train(gym.make("CartPole-v1"), config._replace(vector="async"))


def kind(env, config=tm.Config(), **options):
    envs, _ = tm._make_envs(env, config, **options)
    envs.close()
    return type(envs.unwrapped).__name__


def test_environments_step_as_one_by_default_where_gymnasium_can():
    assert kind("CartPole-v1") == "CartPoleVectorEnv"
    assert kind("Pendulum-v1") == kind(lambda: gym.make("CartPole-v1")) == kind(gym.make("CartPole-v1"))
    assert kind("Pendulum-v1") == "SyncVectorEnv"
    assert kind("CartPole-v1", tm.Config(vector="sync")) == "SyncVectorEnv"
    assert kind("CartPole-v1", tm.Config(sampling="vine")) == "SyncVectorEnv"  # which saves and restores each
    assert kind("CartPole-v1", max_episode_steps=-1) == "SyncVectorEnv"  # no limit, as gym.make has it
    state = tm.train("CartPole-v1", tm.Config(hidden=(3,), total_steps=64, rollout_steps=32))
    assert state.env_args == {}


def test_environments_that_step_as_one_take_the_steps_of_those_that_step_one_by_one():
    rng = np.random.default_rng(0)
    envs = gym.make_vec("CartPole-v1", 3, "vector_entry_point", max_episode_steps=20, sutton_barto_reward=True)
    policy = tm.make_policy(envs.single_observation_space, envs.single_action_space, (4,))
    theta, stats = tm.init_params(policy, rng), tm.RunningStats(0.0, np.zeros(4), np.zeros(4))
    rollout, _ = tm.collect(envs, policy, theta, stats, None, rng, 200)
    alone, largest = gym.make("CartPole-v1", sutton_barto_reward=True).unwrapped, np.abs(rollout.raw_obs).max()
    alone.reset(seed=0)
    assert {length for _, length in rollout.episodes} > {20} and rollout.truncated.any() and rollout.terminated.any()
    for t, e in zip(*np.nonzero(rollout.real[:-1]), strict=True):
        alone.state, alone.steps_beyond_terminated = rollout.raw_obs[t, e], None
        obs, reward, terminated, _, _ = alone.step(int(rollout.actions[t, e, 0]))
        assert (reward, terminated) == (rollout.rewards[t, e], rollout.terminated[t, e])
        # float32 rounds the state before the step, of whose coordinates none moves another by more than half, and after
        assert np.abs(obs - rollout.raw_obs[t + 1, e]).max() <= 2 * np.finfo(np.float32).eps * largest


def test_an_environment_whose_spec_does_not_pickle_trains_in_processes_too(monkeypatch):
    spec = gym.envs.registration.EnvSpec("Made-v0", entry_point=lambda: Counter(), max_episode_steps=20)
    monkeypatch.setitem(gym.registry, "Made-v0", spec)
    config = tm.Config(hidden=(4,), total_steps=80, rollout_steps=40, num_envs=2)
    here, there = (tm.train("Made-v0", config._replace(vector=vector)) for vector in ("sync", "async"))
    assert same(here._replace(config=None), there._replace(config=None)) and there.env == "Made-v0"


def test_an_environment_that_fails_without_a_word_is_refused_with_the_kind_of_its_error():
    def make():
        raise AssertionError

    with pytest.raises(ValueError, match=r"cannot make the environment .*: AssertionError$"):
        tm.train(make)


def test_an_environment_may_be_an_id_or_an_env_or_a_vector_env_or_a_callable():
    config = tm.Config(hidden=(3,), total_steps=64, rollout_steps=32, num_envs=2)
    for env in (
        "CartPole-v1",
        gym.make("CartPole-v1"),
        gym.make_vec("CartPole-v1", 3),
        lambda: gym.make("CartPole-v1"),
    ):
        state = tm.train(env, config)
        assert 61 < state.steps <= 64
        assert state.env == "CartPole-v1"


# ============================================================================================ same seed, same bits
SCRIPT = """
import hashlib, sys, numpy as np, trpo_min as tm
config, infos = tm.Config(hidden=(int(sys.argv[3]),) * 2, total_steps=3000, rollout_steps=1000), []
state = tm.train(sys.argv[1], config, seed=int(sys.argv[2]), callback=lambda state, *info: infos.append(info))
bits = state.theta.tobytes() + state.phi.tobytes() + state.obs_stats.mean.tobytes() + repr(infos).encode()
print(hashlib.sha256(bits).hexdigest())
"""


def run(*argv, cwd=HERE, **environment):
    env = {**os.environ, "PYTHONPATH": str(HERE), "NUMBA_DISABLE_JIT": "0", **environment}
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, cwd=cwd, env=env)


def trained_hash(env_id, seed, threads, hidden):
    result = run("-c", SCRIPT, env_id, seed, hidden, NUMBA_NUM_THREADS=str(threads), OPENBLAS_NUM_THREADS=str(threads))
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(("env_id", "hidden"), [("CartPole-v1", 64), ("Pendulum-v1", 300)])
def test_the_same_seed_gives_the_same_bits_in_two_processes_and_on_one_thread_or_two(env_id, hidden):
    """At width 300 a BLAS that split its products over two threads would round differently."""
    one, two, other = (trained_hash(env_id, seed, threads, hidden) for seed, threads in ((3, 1), (3, 2), (4, 2)))
    assert one == two != other


@given(st.integers(0, 50), st.integers(1, 8))
def test_the_pieces_of_parallel_work_are_all_of_it_once(n, threads):
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tm.numba.config, "NUMBA_NUM_THREADS", threads)
        tm._in_parallel(lambda tag, first, last: done.extend((tag, k) for k in range(first, last)), n, "x")
    assert sorted(done) == [("x", k) for k in range(n)]


@pytest.mark.parametrize("taken", [True, False])
def test_work_for_which_no_more_threads_are_granted_is_done_once(taken, monkeypatch):
    """As by ThreadPoolExecutor, which queues the work first: another of its threads may take it, now or later."""
    queued, done = [], []

    class Full:
        def submit(self, *work):
            if taken:
                work[0](*work[1:])
            queued.append(work)
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(tm.numba.config, "NUMBA_NUM_THREADS", 4)
    monkeypatch.setattr(tm, "_threads", Full)
    tm._in_parallel(lambda first, last: done.extend(range(first, last)), 9)
    for function, *args in () if taken else queued:
        function(*args)
    assert sorted(done) == list(range(9)) and len(queued) == 3


FORK = """
import os, signal, numpy as np, trpo_min as tm
policy, obs = tm.Policy((3, 8, 2), "gaussian"), np.ones((1000, 3))
theta = tm.init_params(policy, np.random.default_rng(0))
before = tm.fvp(policy, theta, obs, theta)
child = os.fork()
signal.alarm(30)
after = tm.fvp(policy, theta, obs, theta)
if not child:
    os._exit(7 if (before == after).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_threads_of_the_kernels_survive_the_fork_of_a_process():
    result = run("-c", FORK, NUMBA_NUM_THREADS="2")
    assert result.stdout.strip() == "7", result.stderr


FORK_IN_A_CALL = """
import os, signal, threading, numpy as np, trpo_min as tm
get, set_threads = tm._openblas()
set_threads(2)
expected = get()  # 1 where SciPy's BLAS is another
there, go = threading.Event(), threading.Event()

def call():
    with tm._one_blas_thread(), tm._blas_lock:
        there.set()
        go.wait()

thread = threading.Thread(target=call)
thread.start()
there.wait()
child = os.fork()
if not child:
    signal.alarm(30)
    policy = tm.Policy((3, 8, 2), "gaussian")
    tm.forward(policy, tm.init_params(policy, np.random.default_rng(0)), np.ones((5, 3)))
    os._exit(6 + get())
go.set()
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 6 == expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_another_thread_is_in_a_call_leaves_a_child_that_works_and_has_its_blas_threads():
    result = run("-c", FORK_IN_A_CALL, OPENBLAS_NUM_THREADS="2")
    assert result.stdout.strip() == "True", result.stderr


LATE = """
import threading, time, numpy as np, trpo_min as tm

def late():
    time.sleep(0.5)  # until the main thread has ended
    policy, obs = tm.Policy((3, 8, 2), "gaussian"), np.ones((1000, 3))
    print(tm.fvp(policy, tm.init_params(policy, np.random.default_rng(0)), obs, np.ones(tm.n_params(policy))).shape)
    print(tm.train("CartPole-v1", tm.Config(hidden=(8,), total_steps=100, rollout_steps=50)).updates)

threading.Thread(target=late).start()
"""


@pytest.mark.slow
def test_a_thread_that_outlives_the_main_thread_can_still_update_a_policy_and_train():
    result = run("-c", LATE, NUMBA_NUM_THREADS="2")
    assert result.stdout.split() == ["(52,)", "2"], result.stderr


def test_calls_in_progress_at_the_same_time_share_the_threads():
    pieces = []
    with pytest.MonkeyPatch.context() as patch, tm._one_blas_thread(), tm._one_blas_thread():
        patch.setattr(tm.numba.config, "NUMBA_NUM_THREADS", 6)
        tm._in_parallel(lambda first, last: pieces.append(last - first), 12)
    assert pieces == [4, 4, 4]


@pytest.mark.parametrize(("threads", "ranks", "used"), [(1, None, 1), (2, None, 2), (2, object(), 1)])
def test_two_functions_run_side_by_side_where_there_are_two_threads_and_no_ranks(threads, ranks, used, monkeypatch):
    monkeypatch.setattr(tm.numba.config, "NUMBA_NUM_THREADS", threads)
    monkeypatch.setattr(tm, "_ranks", ranks)
    assert len(set(tm._both(threading.get_ident, threading.get_ident))) == used
    for functions in ((lambda: 1 / 0, dict), (dict, lambda: 1 / 0)):
        with pytest.raises(ZeroDivisionError):
            tm._both(*functions)


def test_two_functions_run_in_turn_where_no_more_threads_are_granted(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(tm.numba.config, "NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert tm._both(lambda: 1, lambda: 2) == (1, 2)


def test_an_interrupt_of_a_function_ends_the_one_beside_it_at_its_next_kernel(monkeypatch):
    begun, finished = threading.Event(), []

    def first():
        begun.wait(60)
        raise KeyboardInterrupt

    def second():
        for _ in range(2000):
            tm._in_parallel(lambda *_: time.sleep(0.001), 1)
            begun.set()
        finished.append(True)

    monkeypatch.setattr(tm.numba.config, "NUMBA_NUM_THREADS", 2)
    with pytest.raises(KeyboardInterrupt):
        tm._both(first, second)
    assert not finished


KERNELS = """
import sys, numpy as np, trpo_min as tm
rng, out, config = np.random.default_rng(0), {}, tm.Config(hidden=(4,), total_steps=64, rollout_steps=32, cg_tol=1e-4)
for policy in (tm.Policy((3, 5, 4, 2), "gaussian"), tm.Policy((3, 5, 5), "categorical", (2, 3))):
    theta = tm.init_params(policy, rng) + 0.3 * rng.normal(size=tm.n_params(policy))
    obs, v = rng.normal(size=(70, 3)), rng.normal(size=theta.size)
    mu = tm.forward(policy, theta, obs)
    actions = tm.sample(policy, mu, rng)
    batch = tm.Batch(obs, actions, rng.normal(size=70), mu)
    theta_new, info = tm.trpo_update(policy, theta, batch, config)
    parts = (mu, actions, tm.jvp(policy, theta, obs, v), tm.fvp(policy, theta, obs, v, 0.1), theta_new, info.curvature)
    out |= {f"{policy.head}{i}": part for i, part in enumerate(parts)}
value = tm.Policy((3, 4, 1), "value")
out["phi"] = tm.fit_value(value, tm.init_params(value, rng), obs, rng.normal(size=70), config)
flags = rng.random((2, 9, 2)) < 0.3
out["adv"] = tm.gae(*rng.normal(size=(3, 9, 2)), *flags, 0.9, 0.8)[0]
out["cg"] = tm.cg(lambda p: p * np.arange(1.0, 6.0), np.ones(5)).x
out["trained"] = tm.train("CartPole-v1", config, seed=1).theta
np.savez(sys.argv[1], **out)
"""


def test_compiled_kernels_equal_the_python_they_were_compiled_from(tmp_path):
    compiled, interpreted = tmp_path / "compiled.npz", tmp_path / "interpreted.npz"
    for path, disabled in ((compiled, "0"), (interpreted, "1")):
        result = run("-c", KERNELS, path, NUMBA_DISABLE_JIT=disabled)
        assert result.returncode == 0, result.stderr
    with np.load(compiled) as one, np.load(interpreted) as other:
        assert one.files == other.files
        for name in one.files:
            # the same operations in the same order, but for what LLVM fuses; CG, here in float64, amplifies that
            assert allclose(one[name], other[name], rtol=1e-8, atol=1e-10), name


@pytest.mark.slow
def test_what_one_name_of_the_module_compiled_does_not_stand_in_the_way_of_another(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(tm.__file__, package)
    dot = "import numpy as np; print(tm._dot(np.ones(3), np.ones(3)))"
    for cwd, name in ((tmp_path, "package.trpo_min"), (package, "trpo_min"), (tmp_path, "package.trpo_min")):
        result = run("-c", f"import {name} as tm; {dot}", cwd=cwd, PYTHONPATH="")
        assert result.stdout == "3.0\n", result.stderr
    load = "from importlib.util import *; s = spec_from_file_location('x', 'trpo_min.py'); tm = module_from_spec(s); "
    for register in ("", "", "import sys; sys.modules['x'] = tm; "):  # what is not registered cannot be cached
        result = run("-c", f"{load}{register}s.loader.exec_module(tm); {dot}", cwd=package, PYTHONPATH="")
        assert result.stdout == "3.0\n", result.stderr


def test_import_changes_no_setting_and_needs_no_gymnasium():
    script = """
import os, sys, numpy as np, numba
before = dict(os.environ), np.random.get_state()[1].tobytes(), numba.get_num_threads(), np.geterr()
import trpo_min
after = dict(os.environ), np.random.get_state()[1].tobytes(), numba.get_num_threads(), np.geterr()
assert before == after
assert "gymnasium" not in sys.modules
"""
    result = run("-c", script)
    assert result.returncode == 0, result.stderr


UPDATES = """
import resource, numpy as np, trpo_min as tm
rng, policy = np.random.default_rng(0), tm.Policy((4, 64, 64, 2), "categorical", (2,))
theta, obs = tm.init_params(policy, rng), rng.normal(size=(1024, 4))
mu = tm.forward(policy, theta, obs)
batch = tm.Batch(obs, tm.sample(policy, mu, rng), rng.normal(size=1024), mu)
for n in (3, 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        tm.trpo_update(policy, theta, batch)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / n)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocators of other systems do as they do")
def test_an_update_after_the_first_ones_takes_its_memory_from_what_they_freed():
    result = run("-c", UPDATES, NUMBA_NUM_THREADS="1")
    assert float(result.stdout) < 268, result.stderr  # pages of 4 kB: the activations of 1,024 rows alone


def test_overlapping_calls_leave_the_threads_of_blas_as_they_were():
    get_threads, set_threads = tm._openblas()
    original = get_threads()
    try:
        set_threads(2)
        expected = get_threads()
        one, other = tm._one_blas_thread(), tm._one_blas_thread()
        one.__enter__()
        other.__enter__()
        assert get_threads() == 1
        one.__exit__(None, None, None)
        assert get_threads() == 1  # the other is still at it
        other.__exit__(None, None, None)
        assert get_threads() == expected
    finally:
        set_threads(original)


# ============================================================================================ saving and using
@pytest.fixture(scope="module")
def trained():
    return tm.train("CartPole-v1", tm.Config(hidden=(8,), total_steps=2000, rollout_steps=500), seed=1)


def same(a, b):
    return json.dumps(a, default=lambda x: np.asarray(x).tobytes().hex()) == json.dumps(
        b, default=lambda x: np.asarray(x).tobytes().hex()
    )


def test_a_saved_state_comes_back_bit_for_bit_and_acts_the_same(trained, tmp_path):
    tm.save(trained, tmp_path / "checkpoint.npz")
    loaded = tm.load(tmp_path / "checkpoint.npz")
    assert same(loaded, trained)
    assert hash(loaded.policy) == hash(trained.policy)
    obs = np.random.default_rng(0).normal(size=(50, 4))
    before, after = (tm.act(s.policy, s.theta, obs, s.obs_stats, np.random.default_rng(1)) for s in (trained, loaded))
    assert (before == after).all()
    assert os.listdir(tmp_path) == ["checkpoint.npz"]


def test_a_file_that_is_no_checkpoint_is_refused_with_one_sentence(trained, tmp_path):
    path = tmp_path / "checkpoint.npz"
    tm.save(trained, path)
    whole = path.read_bytes()
    for data in (b"", b"hello", b"PK, but no zip", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is not a checkpoint") as refused:
            tm.load(path)
        assert "unsafe" not in str(refused.value)
    rng = np.random.default_rng(0)
    last = range(len(whole) - 22, len(whole))  # they say where the parts are
    for at in (*rng.integers(len(whole), size=200), *last):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            tm.load(path)  # a bit of no consequence
        except ValueError as error:
            assert "is not a checkpoint" in str(error)
    np.savez(path, theta=trained.theta)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        tm.load(path)
    tm.save(trained, path)
    with np.load(path) as content:
        edited = dict(content)
    edited["theta"] = -edited["theta"]
    np.savez(path, **edited)
    with pytest.raises(ValueError, match="changed after it was written"):
        tm.load(path)
    stats = trained.obs_stats
    for state in (
        trained._replace(theta=trained.theta[:-1]),
        trained._replace(theta=trained.theta * np.nan),
        trained._replace(config=trained.config._replace(gamma="x")),
        trained._replace(obs_stats=stats._replace(mean=stats.mean[:2], m2=stats.m2[:2])),
        trained._replace(obs_stats=stats._replace(m2=stats.m2 * np.nan)),
    ):
        tm.save(state, path)
        with pytest.raises(ValueError, match="is not a checkpoint"):
            tm.load(path)


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_from_before_there_was_a_preconditioner_goes_on_without_one(trained, tmp_path):
    settings = trained.config._replace(cg_iters=10)._asdict()
    del settings["precondition"]
    earlier = types.SimpleNamespace(_asdict=lambda: settings)
    tm.save(trained._replace(config=earlier), tmp_path / "checkpoint.npz")
    assert tm.load(tmp_path / "checkpoint.npz").config == tm.Config(**settings, precondition=False)


@pytest.mark.parametrize(("gone", "new"), [("value_kl", None), (None, "kl_memory"), ("value_kl", "kl_memory")])
def test_a_checkpoint_with_other_settings_loads_and_says_so(trained, tmp_path, gone, new):
    settings = trained.config._asdict() | ({gone: 0.2} if gone else {})
    settings.pop(new, None)
    earlier = types.SimpleNamespace(_asdict=lambda: settings)
    tm.save(trained._replace(config=earlier), tmp_path / "checkpoint.npz")
    differ = ", ".join(sorted(filter(None, (gone, new))))
    with pytest.warns(UserWarning, match=f"of another version, with other fields: {differ}$"):
        assert same(tm.load(tmp_path), trained)


def test_a_checkpoint_of_a_state_that_had_other_fields_loads_with_defaults_and_says_so(trained, tmp_path):
    fields = trained._asdict() | {"adv_power": 0.5}
    del fields["powers"]
    tm.save(types.SimpleNamespace(_asdict=lambda: fields), tmp_path / "checkpoint.npz")
    with pytest.warns(UserWarning, match="with other fields: adv_power, powers$"):
        assert same(tm.load(tmp_path), trained._replace(powers=(0.0, 0.0)))
    fields = {name: value for name, value in trained._asdict().items() if name != "steps"}
    tm.save(types.SimpleNamespace(_asdict=lambda: fields), tmp_path / "checkpoint.npz")
    with pytest.raises(ValueError, match="it lacks steps"):
        tm.load(tmp_path)


def test_a_folder_is_saved_to_and_loaded_from_as_its_checkpoint(trained, tmp_path):
    tm.save(trained, tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.npz"]
    assert same(tm.load(tmp_path), trained)


def test_training_for_fewer_steps_than_an_update_takes_is_refused():
    with pytest.raises(ValueError, match=r"^total_steps must be at least the 5 of one update, got 4$"):
        tm.train("CartPole-v1", tm.Config(total_steps=4, num_envs=5))
    assert tm.train("CartPole-v1", tm.Config(total_steps=5, num_envs=5, hidden=(4,))).updates == 1


def test_act_takes_the_most_likely_action_of_the_normalised_observation(trained):
    obs = np.random.default_rng(0).normal(size=(50, 4)) * 0.1
    mu = dense_forward(trained.policy, trained.theta, tm.normalize(trained.obs_stats, obs))
    assert (tm.act(trained.policy, trained.theta, obs, trained.obs_stats) == mu.argmax(axis=1)).all()
    policy = tm.Policy((4, 2), "gaussian")
    theta = np.random.default_rng(1).normal(size=tm.n_params(policy))
    assert allclose(tm.act(policy, theta, obs), dense_forward(policy, theta, obs)[:, :2], rtol=1e-9)


def test_act_refuses_observations_of_another_width(trained):
    for obs in (np.ones(8), np.ones((3, 8)), np.ones(3), np.ones((2, 2, 4)), np.full(4, np.inf)):
        with pytest.raises(ValueError, match="obs must"):
            tm.act(trained.policy, trained.theta, obs, trained.obs_stats)
    with pytest.raises(ValueError, match="whose spaces differ"):
        tm.evaluate(trained, "Acrobot-v1")
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, inf\), got -1"):
        tm.evaluate(trained, "CartPole-v1", seed=-1)
    for call in (lambda: tm.evaluate("run", "CartPole-v1"), lambda: tm.train("CartPole-v1", state="run")):
        with pytest.raises(ValueError, match="state must be a TrainState, as train and load return, got 'run'"):
            call()


def test_evaluation_plays_act_on_the_environment(trained):
    env, total = gym.make("CartPole-v1"), 0.0
    obs, _ = env.reset(seed=7)
    while True:
        obs, reward, terminated, truncated, _ = env.step(tm.act(trained.policy, trained.theta, obs, trained.obs_stats))
        total += reward
        if terminated or truncated:
            break
    assert tm.evaluate(trained, "CartPole-v1", episodes=1, seed=7)[0] == [total]


@pytest.mark.slow
def test_training_stops_at_the_reward_threshold_only_if_asked_to():
    spec = copy.deepcopy(gym.spec("CartPole-v1"))
    spec.reward_threshold = 15.0

    def make():
        return gym.make(spec)

    config = tm.Config(hidden=(4,), total_steps=30_000, rollout_steps=500)
    state = tm.train(make, config)
    assert state.solved
    assert state.steps < 30_000
    assert len(state.returns) == 100
    assert np.mean(state.returns) >= 15
    more = config._replace(total_steps=state.steps + 500)
    assert tm.train(make, more, state=state).steps == state.steps
    assert tm.train(make, more._replace(stop_when_solved=False), state=state).steps == state.steps + 500
    state = tm.train(make, config._replace(stop_when_solved=False))
    assert (state.solved, state.steps) == (False, 30_000)


def test_a_mean_return_of_just_the_reward_threshold_is_enough():
    class Paid(Counter):
        def step(self, action):
            return super().step(action)[0], 1.0, True, False, {}

    env = Paid(0)
    env.spec = gym.envs.registration.EnvSpec("Paid-v0", Paid, reward_threshold=1.0)
    state = tm.train(env, tm.Config(hidden=(), total_steps=200, rollout_steps=10))
    assert (state.solved, state.steps) == (True, 100)


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(trained, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.npz"
    tm.save(trained, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                tm.save(trained._replace(steps=1), path)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["checkpoint.npz"]


def test_numpy_numbers_in_a_config_are_saved(trained, tmp_path):
    config = trained.config._replace(gamma=np.float32(0.5), total_steps=np.int64(7))
    tm.save(trained._replace(config=config), tmp_path / "x.npz")
    assert tm.load(tmp_path / "x.npz").config == config


def test_each_episode_of_an_evaluation_has_a_start_of_its_own(trained):
    starts = []

    class Noting(gym.Wrapper):
        def reset(self, **options):
            obs, info = self.env.reset(**options)
            starts.append(tuple(obs))
            return obs, info

    tm.evaluate(trained, Noting(gym.make("CartPole-v1")), episodes=10)
    assert len({*starts}) == 10


def test_evaluation_changes_no_byte_of_the_state_and_repeats(trained):
    before = json.dumps(trained, default=lambda x: np.asarray(x).tobytes().hex())
    one, two = (tm.evaluate(trained, "CartPole-v1", episodes=3, seed=5) for _ in range(2))
    assert (one[0] == two[0]).all()
    assert (one[0] == one[1]).all()  # CartPole pays 1 a step
    assert json.dumps(trained, default=lambda x: np.asarray(x).tobytes().hex()) == before


# ============================================================================================ bad input
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden", 64), ("hidden", (0,)), ("hidden", (1.5,)), ("hidden", [8]), ("total_steps", 0), ("total_steps", 1.0),
        ("num_envs", True), ("num_envs", -1), ("rollout_steps", "8"), ("gamma", 1.1), ("gamma", None),
        ("lam", -0.1), ("max_kl", 0.0), ("max_kl", np.inf), ("damping", -1e-9), ("cg_iters", 0), ("cg_tol", 1.0),
        ("backtrack_coef", 1.0), ("backtrack_coef", 0.0), ("max_backtracks", 0), ("value_iters", -1),
        ("normalize_obs", 1), ("normalize_reward", "yes"), ("stop_when_solved", None), ("dtype", "float16"),
        ("dtype", 64), ("gamma", np.nan),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_or_of_the_wrong_type_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got "):
        tm.train("CartPole-v1", tm.Config(**{field: value}))


@pytest.mark.parametrize("config", [{}, (), {"gamma": 0.9}, tm.Config])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(ValueError, match="config must be a Config, got"):
        tm.train("CartPole-v1", config)


def test_the_settings_themselves_and_numpy_numbers_pass():
    tm.check_config(tm.Config())
    tm.check_config(
        tm.Config(gamma=np.float32(0.5), hidden=(), num_envs=np.int64(2), damping=0, total_steps=np.int32(5))
    )


def broken(batch, **changes):
    return batch._replace(**{k: f(np.array(getattr(batch, k))) for k, f in changes.items()})


def set_first(value):
    def change(array):
        array.flat[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": lambda a: a[:, :2]}, r"obs must have shape \(any, 3\), got \(60, 2\)"),
        ({"obs": lambda a: a[0]}, "obs must have shape"),
        ({"obs": lambda a: a[:0]}, "obs must not be empty"),
        ({"obs": set_first(np.nan)}, r"obs must be finite in float64, got NaN or infinity at index \[0 0\]"),
        ({"obs": set_first(np.inf)}, "obs must be finite"),
        ({"obs": lambda a: a.astype(str)}, "obs must be"),
        ({"obs": lambda a: a.astype(complex)}, "obs must be"),
        ({"adv": lambda a: a[:-1]}, r"adv must have shape \(60,\), got \(59,\)"),
        ({"adv": set_first(np.nan)}, "adv must be finite"),
        ({"mu_old": set_first(np.inf)}, "mu_old must be finite"),
        ({"mu_old": lambda a: a + 0.1}, r"mu_old must be forward\(policy, theta, obs\)"),
        ({"mu_old": lambda a: a + 1e-7}, r"mu_old must be forward\(policy, theta, obs\)"),
        ({"mu_old": lambda a: a[:, :1]}, "mu_old must have shape"),
        ({"weights": lambda a: np.ones(3)}, "weights must have shape"),
        ({"weights": lambda a: np.nan}, "weights must be finite"),
        ({"group": lambda a: 7}, "group must divide the number of rows, 60, got 7"),
        ({"group": lambda a: 0}, r"group must be an integer in \[1, inf\), got 0"),
        ({"group": lambda a: 2, "weights": lambda a: np.arange(60) // 2}, "weights must not .* all be 0, in a group"),
        ({"group": lambda a: 2, "weights": lambda a: np.arange(60) - 1.0}, "weights must not be negative"),
        ({"group": lambda a: 2}, "each group of 2 rows must be of one state"),
        ({"actions": lambda a: a[:-1]}, "actions must"),
        ({"actions": lambda a: a[:, 0]}, "actions must"),
    ],
)
@pytest.mark.parametrize("head", ["categorical", "gaussian"])
def test_a_bad_batch_is_refused_before_any_work_in_one_sentence(head, changes, message):
    case = fixed_case(head)
    with pytest.raises(ValueError, match=message) as error:
        tm.trpo_update(case.policy, case.theta, broken(make_batch(case), **changes))
    assert "\n" not in str(error.value)


def test_the_heads_refuse_what_does_not_fit_in_one_sentence():
    discrete, gaussian = tm.Policy((3, 5), "categorical", (3, 2)), tm.Policy((3, 2), "gaussian")
    mu, choices, moves = np.zeros((7, 5)), np.zeros((7, 2), int), np.zeros((7, 2))
    for policy, what, actions, message in (
        (discrete, np.zeros((7, 10)), choices, "mu must have shape (any, 5), got (7, 10)"),
        (discrete, np.zeros(5), choices, "mu must have shape (any, 5), got (5,)"),
        (gaussian, mu, moves, "mu must have shape (any, 4), got (7, 5)"),
        (discrete, mu, choices[:1], "actions must be integers of shape (7, 2)"),
        (discrete, mu, moves, "actions must be integers of shape (7, 2)"),
        (discrete, mu, choices - 1, "actions must be choices from 0"),
        (discrete, mu, choices + 2, "actions must be choices from 0"),
        (gaussian, mu[:, :4], moves[:, :1], "actions must have shape (7, 2)"),
        (gaussian, mu[:, :4], moves + np.nan, "actions must be finite"),
        (tm.Policy((3, 5), "value"), mu, choices, "policy must have a gaussian or categorical head"),
    ):
        for head in (tm.log_prob, tm.score):
            with pytest.raises(ValueError, match=re.escape(message)):
                head(policy, what, actions)
        if not message.startswith("actions"):
            for head in (tm.entropy, lambda policy, mu: tm.kl(policy, mu, mu)):
                with pytest.raises(ValueError, match=re.escape(message)):
                    head(policy, what)
    with pytest.raises(ValueError, match="the same shape"):
        tm.kl(discrete, mu, mu[:1])
    with pytest.raises(ValueError, match="policy must have a gaussian or categorical head"):
        tm.sample(tm.Policy((3, 1), "value"), mu[:, :1], np.random.default_rng(0))
    assert tm.log_prob(discrete, mu.tolist(), choices.tolist()).shape == (7,)


@pytest.mark.parametrize("bad", [lambda a: a + 4, lambda a: a - 4, lambda a: a.astype(float)])
def test_actions_that_are_no_choices_are_refused(bad):
    case = fixed_case("categorical")
    with pytest.raises(ValueError, match="actions must be"):
        tm.trpo_update(case.policy, case.theta, broken(make_batch(case), actions=bad))


def test_choices_may_be_integers_of_any_type():
    case = fixed_case("categorical")
    batch = make_batch(case)
    expected = tm.surrogate_grad(case.policy, case.theta, batch)
    for dtype in (np.uint8, np.int16, np.uint64):
        typed = batch._replace(actions=batch.actions.astype(dtype))
        assert (tm.surrogate_grad(case.policy, case.theta, typed) == expected).all()


def test_bad_parameters_are_refused():
    case = fixed_case()
    for theta in (case.theta[:-1], case.theta[None], case.theta * np.nan, case.theta.astype(np.float16), "theta", None):
        with pytest.raises(ValueError, match="theta must"):
            tm.forward(case.policy, theta, case.obs)
    for dtype in (np.int32, np.float16):
        with pytest.raises(ValueError, match="theta must be float64 or float32"):
            tm.init_params(case.policy, case.rng, dtype)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (tm.Policy((3, 2), "gausian"), "head must be"),
        (tm.Policy((3,), "gaussian"), "sizes must be"),
        (tm.Policy([3, 2], "gaussian"), "sizes and nvec must be tuples"),
        (tm.Policy((3, 4), "categorical", 4), "sizes and nvec must be tuples"),
        (tm.Policy((3, 0, 2), "gaussian"), "sizes and nvec must be"),
        (tm.Policy((3, 4.0, 2), "gaussian"), "sizes and nvec must be"),
        (tm.Policy((3, True, 2), "gaussian"), "sizes and nvec must be"),
        (tm.Policy((3, np.uint8(200), 2), "gaussian"), "sizes and nvec must be"),
        (tm.Policy((3, 4), "categorical", (5,)), "nvec must"),
        (tm.Policy((3, 4), "categorical"), "nvec must"),
        (tm.Policy((3, 4), "categorical", (4, 0)), "sizes and nvec must be"),
        (tm.Policy((3, 4), "gaussian", (4,)), "nvec must"),
    ],
)
def test_a_policy_that_does_not_fit_together_is_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        tm.init_params(policy, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        tm.forward(policy, np.zeros(8), np.zeros((1, 3)))


def test_an_update_refuses_a_config_out_of_range():
    case = fixed_case()
    wrong = tm.Config(max_kl=-1.0), tm.Config(cg_iters=2.5), tm.Config(gamma=10**400), tm.Config(lam=np.inf)
    for config in (*wrong, {"lam": 1}, None):
        with pytest.raises(ValueError, match="must be"):
            tm.trpo_update(case.policy, case.theta, make_batch(case), config)


def test_weights_and_advantages_of_any_scale_give_the_same_step():
    case = fixed_case("gaussian")
    batch, config = make_batch(case), tm.Config(cg_iters=3)
    one, info = tm.trpo_update(case.policy, case.theta, batch, config)
    for weight, size in ((1e-200, 1.0), (1e200, 1.0), (1.0, 1e-310)):  # the last as where rewards have long been 0
        scaled_batch = batch._replace(weights=weight, adv=size * batch.adv)
        other, scaled = tm.trpo_update(case.policy, case.theta, scaled_batch, config)
        assert scaled.accepted == info.accepted
        assert np.abs(one - other).max() <= 1e-6 * np.abs(one - case.theta).max()


def test_rows_without_weight_change_nothing_whatever_their_advantages():
    case = fixed_case("gaussian")
    batch = make_batch(case)
    weights, adv = np.ones(len(batch.adv)), 1e-10 * batch.adv
    weights[::3] = 0
    one, info = tm.trpo_update(case.policy, case.theta, batch._replace(adv=adv, weights=weights))
    adv[::3] = 1e300
    other, _ = tm.trpo_update(case.policy, case.theta, batch._replace(adv=adv, weights=weights))
    assert info.accepted and (one == other).all()


@pytest.mark.parametrize("head", ["categorical", "gaussian"])
def test_in_groups_no_scale_of_the_weights_of_a_state_changes_the_step(head):
    case, batch = grouped(fixed_case(head), 3)
    one, info = tm.trpo_update(case.policy, case.theta, batch)
    scale = np.repeat(np.tile([1e-300, 1e-9, 1.0, 1e9, 1e300], 12), 3)
    other, scaled = tm.trpo_update(case.policy, case.theta, batch._replace(weights=batch.weights * scale))
    assert info.accepted and scaled.accepted
    assert np.abs(one - other).max() <= 1e-9 * np.abs(one - case.theta).max()
    assert isclose(info.step_length, scaled.step_length, rtol=1e-9) and isclose(info.kl, scaled.kl, rtol=1e-6)


@pytest.mark.parametrize(("weights", "size"), [(1e200, 1e200), (1e-310, 1.0)])
def test_advantages_that_overflow_with_their_weights_or_all_but_vanish_are_refused(weights, size):
    case = fixed_case()
    batch = make_batch(case)
    with pytest.raises(ValueError, match="must be of a size float64 can hold"):
        tm.trpo_update(case.policy, case.theta, batch._replace(weights=weights, adv=batch.adv * size))


def test_an_infinite_gradient_is_not_finite_and_theta_is_kept():
    case = fixed_case("gaussian")
    batch = make_batch(case)
    batch.actions[0] = 1e200
    theta, info = tm.trpo_update(case.policy, case.theta, batch)
    assert (theta == case.theta).all() and not info.accepted
    assert "not finite" in info.reason and info.cg_status == "not finite"


def test_a_runner_is_of_the_same_environments():
    one, three = counters(1, AutoresetMode.NEXT_STEP), counters(3, AutoresetMode.NEXT_STEP)
    state, runner = start(one)
    with pytest.raises(ValueError, match="runner must be of 3 environments"):
        tm.collect(three, state.policy, state.theta, state.obs_stats, runner, np.random.default_rng(0), 5)


def test_the_update_is_for_policies_and_the_fit_for_value_functions():
    case, value = fixed_case(), tm.Policy((3, 8, 4), "value")
    with pytest.raises(ValueError, match="gaussian or categorical head"):
        tm.trpo_update(value, case.theta, make_batch(case))
    for net in (case.policy, value):
        with pytest.raises(ValueError, match="value must be a network with one output"):
            tm.fit_value(net, case.theta, case.obs, np.zeros(60))


def test_numbers_out_of_range_are_refused():
    case, one = fixed_case(), np.ones((1, 1))
    for name, call in {
        "max_iter": lambda: tm.cg(lambda p: p, np.ones(2), max_iter=-1),
        "tol": lambda: tm.cg(lambda p: p, np.ones(2), tol=np.nan),
        "damping": lambda: tm.fvp(case.policy, case.theta, case.obs, case.theta, damping=-1.0),
        "gamma": lambda: tm.gae(one, one, one, one, one, 1.1, 1.0),
        "lam": lambda: tm.gae(one, one, one, one, one, 1.0, None),
        "seed": lambda: tm.train("CartPole-v1", seed=np.random.SeedSequence(1)),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            call()


def test_cg_and_fisher_metric_refuse_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="matvec"):
        tm.cg(lambda p: p[:1], np.ones(4))
    policy = tm.Policy((1, 2), "categorical", (2,))
    with pytest.raises(ValueError, match="dmu must have shape"):
        tm.fisher_metric(policy, np.zeros((1, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"mu must have shape \(any, 2\)"):
        tm.fisher_metric(policy, np.zeros((2, 1)), np.zeros((2, 1)))


def test_a_rollout_of_what_does_not_fit_together_is_refused():
    """The compiled step reads and writes by these lengths."""
    envs = counters(2, AutoresetMode.NEXT_STEP)
    state, runner = start(envs)
    mean, more = state.obs_stats.mean, np.r_[state.theta, 0.0]
    for theta, stats, n_steps, n_saved, message in (
        (more, state.obs_stats, 2, 0, "theta must have shape"),
        (state.theta * np.nan, state.obs_stats, 2, 0, "theta must be finite"),
        (state.theta, tm.RunningStats(1.0, mean[:-1], mean[:-1]), 2, 0, "statistics must be of"),
        (state.theta, tm.RunningStats(1.0, mean, mean[:-1]), 2, 0, "statistics must be of"),
        (state.theta, state.obs_stats, 0, 0, "n_steps must be"),
        (state.theta, state.obs_stats, 2, 3, "n_saved must be"),
    ):
        with pytest.raises(ValueError, match=message):
            tm.collect(envs, state.policy, theta, stats, runner, np.random.default_rng(0), n_steps, 0.9, n_saved)
    with pytest.raises(ValueError, match="statistics must be of"):
        tm.normalize(tm.RunningStats(1.0, mean, mean[:-1]), mean[None])


def test_a_batch_that_is_no_batch_is_refused():
    case = fixed_case()
    with pytest.raises(ValueError, match="batch must be a Batch"):
        tm.trpo_update(case.policy, case.theta, tuple(make_batch(case)))


class Faulty(Counter):
    """Turns bad after 100 steps."""

    def __init__(self, fault):
        super().__init__(1)
        self.fault, self.n = fault, 0

    def step(self, action):
        self.n += 1
        obs, reward, *rest = super().step(action)
        if self.n > 100:
            if self.fault == "raise":
                raise RuntimeError("the simulator broke")
            obs = obs * np.nan if self.fault == "observation" else obs
            reward = np.nan if self.fault == "reward" else reward
        return obs, reward, *rest


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("observation", ValueError, "observation with NaN or infinity"),
        ("reward", ValueError, "a reward of nan"),
        ("raise", RuntimeError, "the simulator broke"),
    ],
)
def test_an_environment_that_breaks_ends_training_with_what_was_learned(fault, kind, message):
    states = []
    with pytest.raises(kind, match=message) as error:
        tm.train(Faulty(fault), tm.Config(hidden=(3,), rollout_steps=20), callback=lambda s, *_: states.append(s))
    assert len(states) >= 4
    assert same(error.value.state, states[-1])


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_a_number_whose_square_overflows_ends_training_with_a_state_that_loads(what, tmp_path):
    class Spike(Faulty):
        observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)

        def step(self, action):
            obs, reward, *rest = super().step(action)
            size = 1e200 if self.n == 101 else 1.0
            return (obs.astype(float) * size, reward, *rest) if what == "observation" else (obs, reward * size, *rest)

    with pytest.raises(ValueError, match="squares of observations or rewards overflow") as error:
        tm.train(Spike(None), tm.Config(hidden=(3,), rollout_steps=20))
    tm.save(error.value.state, tmp_path / "checkpoint.npz")
    assert tm.load(tmp_path).updates >= 4


@pytest.mark.parametrize("rows", [np.zeros((4, 1)), np.zeros(3), np.zeros((0, 3)), np.full((2, 3), np.nan)])
def test_running_statistics_refuse_rows_of_other_shapes_and_what_is_not_finite(rows):
    stats = tm.RunningStats(5.0, np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="rows of observations or rewards must"):
        tm.update_stats(stats, rows)


def test_observations_that_the_type_asked_for_cannot_hold_are_not_normalised():
    empty = tm.RunningStats(0.0, np.zeros(1), np.zeros(1))
    assert tm.normalize(empty, [[1e300]]) == 1e300
    with pytest.raises(ValueError, match=r"of a size that float32 can hold, got 1e\+300 at most"):
        tm.normalize(empty, [[1e300]], np.float32)


def test_the_observation_that_is_refused_is_the_one_that_is_shown():
    obs = np.arange(6.0).reshape(3, 2)
    obs[1, 0] = np.nan
    with pytest.raises(ValueError, match=r"dtype: \[nan  3\.\]$"):
        tm._check_observed(False, obs)
    with pytest.raises(ValueError, match=r"dtype: \[4.e\+60 5.e\+60\]$"):  # too large for float32
        tm._check_observed(False, np.arange(6.0).reshape(3, 2) * 1e60)


def test_an_exception_that_has_another_state_keeps_its_message_and_carries_what_was_learned():
    class Door(Exception):
        state = property(lambda self: "open")

    def fail(*_):
        raise Door("it is stuck")

    with pytest.raises(RuntimeError, match="Door: it is stuck") as error:
        tm.train("CartPole-v1", tm.Config(hidden=(3,), rollout_steps=20), callback=fail)
    assert error.value.state.updates == 1 and isinstance(error.value.__context__, Door)


def test_a_state_has_the_name_of_the_environment_that_it_was_trained_on():
    for env in (Counter(1), lambda: Counter(1), gym.vector.SyncVectorEnv([lambda: Counter(1)])):
        assert tm.train(env, tm.Config(hidden=(3,), rollout_steps=20, total_steps=20)).env == "Counter"


def test_a_value_error_out_of_other_code_is_named_as_such(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tm, "learn", lambda *_: int("forty"))
    code = tm.main(["--env", "CartPole-v1", "--out", str(tmp_path / "run"), "--quiet"])
    assert code == 2 and capsys.readouterr().err == (
        "trpo_min: ValueError: invalid literal for int() with base 10: 'forty' (--debug shows where)\n"
    )


def test_an_interrupt_carries_what_was_learned():
    def interrupt(state, *_):
        if state.updates == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        tm.train("CartPole-v1", tm.Config(hidden=(3,), rollout_steps=20), callback=interrupt)
    assert error.value.state.updates == 3


def test_an_exception_that_is_its_own_cause_in_the_end_still_leaves_training():
    def fail(*_):
        first, second = RuntimeError("the door is stuck"), ValueError()
        first.__cause__, second.__cause__ = second, first
        raise first

    with pytest.raises(RuntimeError, match="the door is stuck") as error:
        tm.train("CartPole-v1", tm.Config(hidden=(3,), rollout_steps=20), callback=fail)
    assert error.value.state.updates == 1


def test_an_interrupt_handled_earlier_is_not_raised_again():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(RuntimeError, match="the simulator broke"):
            tm.train(Faulty("raise"), tm.Config(hidden=(3,), rollout_steps=20))


def test_a_signal_in_compiled_code_arrives_as_the_interrupt_that_it_is(monkeypatch):
    def interrupted(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as cause:
            raise SystemError("returned a result with an exception set") from cause  # what Numba makes of it

    monkeypatch.setattr(tm, "_solve", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        tm.train("CartPole-v1", tm.Config(hidden=(3,), rollout_steps=20))
    assert error.value.state.updates == 0


# ============================================================================================ the command line
def shell(tmp_path, *argv):
    return run(HERE / "trpo_min.py", *argv, cwd=tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env", "CartPol-v1"], "CartPole"),
        (["--env", "CartPole-v1", "--gama", "0.9"], "did you mean --gamma"),
        (["--env", "CartPole-v1", "--gamma", "2"], "gamma must be a number in [0, 1], got 2.0"),
        (["--env", "CartPole-v1", "--gamma", "high"], "--gamma"),
        (["--env", "CartPole-v1", "--hidden", "8", "0"], "hidden must be an integer in [1, inf), got 0"),
        (["--env", "no_such_module:Env-v0"], "no_such_module"),
        (["--env", "CartPole-v1", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--env", "CartPole-v1", "--num-envs", "1.5"], "integer"),
        (["--env", "CartPole-v1", "--env-args", "[1]"], "--env-args"),
        (["--env", "CartPole-v1", "--env-args", '{"env": 1}'], "cannot make the environment CartPole-v1"),
        (["--env", "CartPole-v1", "--env-args", '{"gravitas": 1}'], "gravitas"),
        (["--env", "CartPole-v1", "--resume", "here"], "--resume: not allowed with argument --env"),
        (["--env", "CartPole-v1", "--episodes", "3"], "--episodes does not go with --env"),
        (["--env", "CartPole-v1", "--out", "/dev/null/here"], "/dev/null"),
        (["--resume", "here", "--gamma", "0.9"], "--gamma does not go with --resume, which keeps the settings"),
        (["--resume", "here"], "here is not the folder of a run"),
        (["--eval", "here"], "here"),
        (["--eval", "here", "--max-kl", "0.1"], "--max-kl does not go with --eval"),
        (["--eval", "here", "--episodes", "0"], "--episodes must be at least 1, got 0"),
        (["--plot", "here"], "here"),
        (["--env", "CartPole-v1", "--total-steps", "3", "--quiet"], "total_steps must be at least the 16"),
        ([], "--env"),
    ],
)
def test_misuse_from_the_shell_is_one_sentence_and_exit_code_2(tmp_path, argv, message):
    result = shell(tmp_path, *argv)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert os.listdir(tmp_path) == []


def test_a_run_from_the_shell_says_what_it_does_and_saves_it(tmp_path):
    options = ["--total-steps", "3e3", "--hidden", "8", "8", "--vector", "sync", "--out", "here"]
    result = shell(tmp_path, "--env", "CartPole-v1", *options)
    assert result.returncode == 0, result.stderr
    for text in ("CartPole-v1", "Discrete(2)", "4-8-8-2", "seed 0", "saved in here"):
        assert text in result.stdout
    state = tm.load(tmp_path / "here" / "checkpoint.npz")
    assert (state.steps, state.config.hidden, state.env) == (3000, (8, 8), "CartPole-v1")
    again = shell(tmp_path, "--env", "CartPole-v1", "--out", "here")
    assert again.returncode == 2
    assert "not overwritten" in again.stderr
    quiet = shell(tmp_path, "--env", "CartPole-v1", "--total-steps", "16", "--quiet")
    assert quiet.returncode == 0
    assert len(quiet.stdout.splitlines()) == 1 and "no episode ended, after 16 steps" in quiet.stdout


LOGGING = """
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv

class Logging(PendulumEnv):
    def __init__(self, **options):
        super().__init__(**options)
        self.cycle, self.log = self.step, open(f"log{id(self)}", "w")

    def step(self, action):
        self.log.write("x")
        return super().step(action)

gym.register("Logging-v0", Logging, max_episode_steps=200)
"""


@pytest.mark.slow
def test_what_an_environment_in_a_reference_cycle_has_not_written_yet_is_written_at_the_end(tmp_path):
    (tmp_path / "logging_env.py").write_text(LOGGING)
    result = shell(tmp_path, "--env", "logging_env:Logging-v0", "--total-steps", "200", "--hidden", "8")
    assert result.returncode == 0, result.stderr
    assert sum(len(log.read_text()) for log in tmp_path.glob("log*[0-9]")) == 200


def test_a_run_that_vine_refuses_leaves_no_folder(tmp_path):
    result = shell(tmp_path, "--env", "CartPole-v1", "--sampling", "vine", "--total-steps", "1000", "--out", "here")
    assert result.returncode == 2 and "total_steps must be at least the 1536" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and os.listdir(tmp_path) == []


def test_a_signal_while_a_checkpoint_is_written_does_not_stop_the_writing(tmp_path, monkeypatch, capsys):
    save = tm.save

    def slow_save(state, path):
        if state.updates:
            os.kill(os.getpid(), signal.SIGTERM)
        save(state, path)

    monkeypatch.setattr(tm, "save", slow_save)
    assert tm.main(["--env", "CartPole-v1", "--out", str(tmp_path / "x"), "--quiet"]) == 128 + signal.SIGTERM
    assert tm.load(tmp_path / "x").updates == 1


STOPPING = "\ntrpo_min: stopping after the update in progress; at a second signal, at once\n"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_a_run_after_the_update_and_saves_it(tmp_path, name):
    command = [sys.executable, str(HERE / "trpo_min.py"), "--env", "Pendulum-v1", "--out", "here"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )  # fmt: skip
    while "  return " not in process.stdout.readline():  # trains by now
        assert process.poll() is None, process.stderr.read()
    process.send_signal(getattr(signal, name))
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, name)
    assert output.splitlines()[-1].startswith("stopped Pendulum-v1")
    assert errors == STOPPING
    assert tm.load(tmp_path / "here" / "checkpoint.npz").updates >= 1


def test_a_signal_to_the_processes_of_the_environments_too_is_an_interrupt(tmp_path):
    command = [sys.executable, str(HERE / "trpo_min.py"), "--env", "Pendulum-v1", "--vector", "async", "--out", "here"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while "  return " not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.startswith(STOPPING)
    later = errors.removeprefix(STOPPING)
    assert later == "" or later.startswith("trpo_min: interrupted; the state after")  # as the processes end in time
    assert tm.load(tmp_path / "here" / "checkpoint.npz").updates >= 1


def test_an_output_that_lacks_the_letters_of_a_path_fails_no_run(tmp_path):
    argv = "--env", "CartPole-v1", *QUICK, "--total-steps", 32, "--quiet", "--out", "\u00fc"
    result = run(HERE / "trpo_min.py", *argv, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "saved in \\xfc" in result.stdout, result.stderr


def test_a_second_signal_interrupts_a_long_update_and_still_saves(tmp_path):
    command = [sys.executable, str(HERE / "trpo_min.py"), "--env", "Pendulum-v1", "--out", "here"]
    process = subprocess.Popen(
        [*command, "--rollout-steps", "60000"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "  return " not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    for _ in range(2):
        time.sleep(0.3)  # into the next rollout
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert tm.load(tmp_path / "here" / "checkpoint.npz").updates >= 1


def test_any_second_signal_interrupts_and_an_ignored_one_stays_ignored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with tm._signals_noted() as signals:
        os.kill(os.getpid(), signal.SIGINT)
    assert signals == []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tm._signals_noted() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals == [signal.SIGTERM]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["| true", "> /dev/full", ">&-"])
def test_a_reader_who_has_gone_does_not_end_the_training(tmp_path, output):
    command = f"{sys.executable} {HERE / 'trpo_min.py'} --env CartPole-v1 --vector sync --total-steps 20_000 --out here"
    subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} {output}"], cwd=tmp_path, check=True)
    assert tm.load(tmp_path / "here").steps == 20_000


def test_main_leaves_the_signal_handlers_as_they_were(tmp_path, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert tm.main(["--env", "CartPole-v1", "--total-steps", "64", "--out", str(tmp_path / "x"), "--quiet"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "trained CartPole-v1" in capsys.readouterr().out


def test_a_run_that_breaks_saves_first(tmp_path):
    (tmp_path / "faulty.py").write_text(
        "import gymnasium as gym\n"
        f"import sys; sys.path.append({str(HERE)!r})\n"
        "from test_trpo_min import Faulty\n"
        "gym.register('Faulty-v0', lambda: Faulty('observation'))\n"
    )
    result = run(
        HERE / "trpo_min.py", "--env", "faulty:Faulty-v0", "--out", "here", "--rollout-steps", 80, cwd=tmp_path,
        PYTHONPATH=f"{HERE}:{tmp_path}",
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert "NaN or infinity" in result.stderr and "is saved in here" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert tm.load(tmp_path / "here" / "checkpoint.npz").updates >= 1


# ============================================================================================ a run's folder
# one environment and no step that only resets: every update counts rollout_steps
QUICK = ["--rollout-steps", "16", "--num-envs", "1", "--vector", "sync", "--hidden", "4", "--no-stop-when-solved"]
QUICK += ["--quiet"]


def main(*argv):
    assert tm.main([*map(str, argv)]) == 0


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def run_folder(tmp_path):
    """A run of 10 updates."""
    main("--env", "CartPole-v1", *QUICK, "--total-steps", 160, "--out", tmp_path / "run")
    return tmp_path / "run"


def test_config_json_says_all_that_it_takes_to_repeat_a_run(run_folder):
    record = json.loads((run_folder / "config.json").read_text())
    assert (record["ranks"], record["resumed_after_steps"]) == (1, 0)
    assert record["versions"].keys() >= {"python", "numpy", "numba", "scipy", "gymnasium", "trpo_min"}
    config = tm.Config(**record["config"] | {"hidden": tuple(record["config"]["hidden"])})
    again = tm.train(record["env"], config, seed=record["seed"])
    assert same(again, tm.load(run_folder))


def test_progress_csv_has_a_row_for_each_update_that_says_what_it_did(tmp_path):
    out, seen = tmp_path / "run", []
    main("--env", "CartPole-v1", *QUICK, "--total-steps", 1600, "--seed", 3, "--out", out)
    config = tm.load(out).config
    tm.train("CartPole-v1", config, seed=3, callback=lambda *progress: seen.append(progress))
    rows = tm.read_progress(out)
    assert [row["update"] for row in rows] == list(range(1, 101))
    for row, (state, info, explained) in zip(rows, seen, strict=True):
        returns = state.returns or (np.nan,)
        expected = {
            "steps": state.steps, "episodes": state.episodes, "return_mean": np.mean(returns),
            "return_min": min(returns), "return_max": max(returns),
            "length_mean": np.mean(state.lengths) if state.lengths else np.nan,
            "kl_mean": info.kl, "kl_max": info.kl_largest, "surrogate_gain": info.surrogate - info.surrogate_old,
            "step_length": info.step_length, "backtracks": info.backtracks, "cg_iters": info.cg_iters,
            "cg_residual": info.cg_residual, "entropy": info.entropy, "explained_variance": explained,
        }  # fmt: skip
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(rows))


def test_two_resumes_of_one_checkpoint_are_the_same_bits_and_go_on_in_the_same_table(run_folder, tmp_path):
    before = tm.read_progress(run_folder)
    shutil.copytree(run_folder, tmp_path / "twin")
    for folder in (run_folder, tmp_path / "twin"):
        main("--resume", folder, "--total-steps", 480, "--quiet")
    one, two = (tm.load(folder) for folder in (run_folder, tmp_path / "twin"))
    assert same(one, two)
    rows = tm.read_progress(run_folder)
    assert [row["update"] for row in rows] == list(range(1, 31))
    assert str(rows[:10]) == str(before)  # NaN is no number to compare
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(rows))
    assert one.config == tm.load(tmp_path / "twin").config._replace(total_steps=480)


def test_a_resume_from_before_the_first_update_is_the_run_itself(tmp_path):
    policy = tm.make_policy(gym.make("CartPole-v1").observation_space, spaces.Discrete(2), (4,))
    config = tm.Config(hidden=(4,), total_steps=200, rollout_steps=50)
    start = tm.init_state("CartPole-v1", policy, config, seed=5)
    assert same(tm.train("CartPole-v1", state=start), tm.train("CartPole-v1", config, seed=5))


def test_a_finished_run_is_not_resumed_but_told_how_to_go_on(run_folder, tmp_path, capsys):
    before = contents(run_folder)
    assert tm.main(["--resume", str(run_folder)]) == 2
    assert "give a larger --total-steps" in capsys.readouterr().err
    tm.save(tm.load(run_folder)._replace(solved=True), run_folder / "checkpoint.npz")
    assert tm.main(["--resume", str(run_folder), "--stop-when-solved"]) == 2
    assert "give --no-stop-when-solved" in capsys.readouterr().err
    assert contents(run_folder)["progress.csv"] == before["progress.csv"]


def test_nothing_that_a_folder_holds_is_overwritten(run_folder, tmp_path, capsys):
    before = contents(run_folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("all of it")
    for folder in (run_folder, other):
        assert tm.main(["--env", "CartPole-v1", "--out", str(folder)]) == 2
        assert "is not overwritten" in capsys.readouterr().err
    assert contents(run_folder) == before
    assert os.listdir(other) == ["thesis.tex"]


def test_an_error_before_the_first_update_takes_nothing_away_but_what_the_run_made(run_folder, tmp_path, capsys):
    (run_folder / "notes.txt").write_text("mine")
    start = tm.load(run_folder)
    tm.save(start._replace(updates=0, steps=0, solved=True), run_folder / "checkpoint.npz")
    before = contents(run_folder)
    assert tm.main(["--resume", str(run_folder), "--stop-when-solved", "--quiet"]) == 2
    after = contents(run_folder)
    assert after.keys() == before.keys() and after["checkpoint.npz"] == before["checkpoint.npz"]
    assert after["config.json"] == before["config.json"]
    for name in ("pend.npz", "checkpoint.txt"):
        tm.save(start, run_folder / name)
        assert tm.main(["--resume", str(run_folder / name)]) == 2
    assert tm.main(["--env", "CartPole-v1", "--total-steps", "3", "--out", str(tmp_path / "new"), "--quiet"]) == 2
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    assert tm.main(["--env", "CartPole-v1", "--total-steps", "3", "--out", str(tmp_path / "new"), "--quiet"]) == 2
    assert os.listdir(tmp_path / "new") == []


def test_an_error_before_the_first_update_leaves_an_empty_folder_runs_that_is_not_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert tm.main(["--env", "CartPole-v1", "--total-steps", "3", "--out", "new", "--quiet"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert tm.main(["--env", "CartPole-v1", "--total-steps", "3", "--quiet"]) == 2
    assert not list(tmp_path.iterdir())


def test_a_state_is_not_trained_on_with_other_spaces_or_another_network(trained):
    config = trained.config._replace(total_steps=10_000)
    for env, changes in (("Acrobot-v1", {}), ("CartPole-v1", {"hidden": (9,)}), ("CartPole-v1", {"dtype": "float32"})):
        with pytest.raises(ValueError, match="state is of another network"):
            tm.train(env, config._replace(**changes), state=trained)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "edited", "other spaces", "no environment"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_resume_and_eval_in_one_sentence(run_folder, damage, capsys):
    path = run_folder / "checkpoint.npz"
    state = tm.load(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        np.savez(path, weights=np.ones(3))
    elif damage == "edited":
        with np.load(path) as content:
            edited = dict(content)
        edited["state"] = np.asarray(str(edited["state"]).replace('"steps": 160', '"steps": 161'))
        np.savez(path, **edited)
    else:
        tm.save(state._replace(env={"other spaces": "Acrobot-v1", "no environment": "Gone-v0"}[damage]), path)
    before = contents(run_folder)
    for argv in (["--resume", str(run_folder), "--total-steps", "320", "--quiet"], ["--eval", str(run_folder)]):
        assert tm.main(argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        after = contents(run_folder)
        assert after == before


def test_a_resume_goes_on_with_the_columns_that_the_table_has(run_folder):
    table = run_folder / "progress.csv"
    table.write_text("".join(f"{line},7\n" for line in table.read_text().replace(",entropy", ",other").splitlines()))
    table.write_text(table.read_text().replace("seconds,7", "seconds,seven"))
    main("--resume", run_folder, "--total-steps", 320, "--quiet")
    rows = tm.read_progress(run_folder)
    assert [row["update"] for row in rows] == list(range(1, 21)) and "entropy" not in rows[0]
    assert [row["seven"] for row in rows[:10]] == [7.0] * 10
    assert all(np.isnan([row["seven"], row["other"]]).all() and row["steps"] == 16 * row["update"] for row in rows[10:])


def test_a_line_of_the_terminal_and_a_row_of_the_table_say_the_same(tmp_path, capsys):
    main("--env", "CartPole-v1", *QUICK[:-1], "--total-steps", 160, "--out", tmp_path / "run")
    lines = [line for line in capsys.readouterr().out.splitlines() if "  return " in line]
    names = "steps", "return_mean", "kl_mean", "kl_max", "entropy", "explained_variance", "steps_per_second"
    tolerances = (0, 0), (1e-4, 0), (0.05, 0), (0.05, 0), (0, 0.005), (0, 0.5), (0, 0.51)  # relative, absolute
    for line, row in zip(lines, tm.read_progress(tmp_path / "run"), strict=True):
        said = re.findall(r"(?<= )(?:-?[\d.]+(?:e[-+]\d+)?|nan)(?=[ %/])", f" {line.replace(',', '')}")
        expected = [row[name] * (100 if name == "explained_variance" else 1) for name in names]
        for a, b, (rel, absolute) in zip(said, expected, tolerances, strict=True):
            assert float(a) == pytest.approx(b, rel=rel, abs=absolute, nan_ok=True)


def test_the_seconds_of_the_updates_add_up_to_those_of_the_run(run_folder):
    main("--resume", run_folder, "--total-steps", 320, "--quiet")  # compiled by now
    rows = tm.read_progress(run_folder)
    least, most = (sum(16 / (row["steps_per_second"] + x) for row in rows[10:]) for x in (0.051, -0.051))  # rounded
    assert least - 0.002 <= rows[-1]["seconds"] - rows[9]["seconds"] <= most + 0.002


def test_a_resume_drops_the_rows_that_the_checkpoint_does_not_know_of_and_a_line_cut_short(run_folder):
    table, state = run_folder / "progress.csv", tm.load(run_folder)
    lines = table.read_text().splitlines(keepends=True)
    for text in (lines, [lines[0], *lines[5:]], [lines[0]], [], [lines[0][:9]]):  # whole, or from a rescued folder
        table.write_text("".join([*text, *([lines[-1].replace("10,160", "11,176"), "12,19"] if text[1:] else [])]))
        tm.save(state, run_folder / "checkpoint.npz")
        main("--resume", run_folder, "--total-steps", 192, "--quiet")
        updates = [row["update"] for row in tm.read_progress(run_folder)]
        assert updates == [*range(11 - len(text[1:]), 11), 11, 12]
    for text in ("\n", "update,steps\n1,2\n", lines[0] + lines[1].replace("1,16", "1,x"), "".join(lines[1:])):
        table.write_text(text)
        with pytest.raises(ValueError, match=r"progress.csv is not what trpo_min wrote"):
            tm.read_progress(run_folder)


def test_a_row_that_is_not_yet_whole_is_not_read(run_folder):
    table = run_folder / "progress.csv"
    before = tm.read_progress(run_folder)
    table.write_text(table.read_text()[:-40])
    assert str(tm.read_progress(run_folder)) == str(before[:-1])
    main("--plot", run_folder, "--out", run_folder / "curve.png")


def test_what_a_process_leaves_that_is_killed_before_its_first_checkpoint_is_no_run(run_folder, tmp_path, capsys):
    folder = tmp_path / "killed"
    folder.mkdir()
    for name in ("progress.csv", "checkpoint.npz.123.tmp", "config.json.123.tmp"):
        (folder / name).touch()
    assert tm.main(["--resume", str(folder)]) == 2
    assert "checkpoint.npz" in capsys.readouterr().err
    main("--env", "CartPole-v1", *QUICK, "--total-steps", 160, "--out", folder)
    assert same(tm.load(folder), tm.load(run_folder))
    assert contents(folder).keys() == contents(run_folder).keys()
    os.unlink(folder / "checkpoint.npz")
    assert tm.main(["--env", "CartPole-v1", "--out", str(folder)]) == 2
    assert "is not overwritten" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="there is no /proc")
@pytest.mark.parametrize("mode", ["env", "resume"])
def test_no_process_of_an_environment_holds_the_lock_of_a_run(tmp_path, mode):
    main("--env", "Pendulum-v1", *QUICK, "--vector", "async", "--total-steps", 32, "--out", tmp_path / "run")
    given = {"env": "Pendulum-v1", "resume": tmp_path / "run", "out": tmp_path / "new"}
    with contextlib.ExitStack() as stack:
        open_run = {"env": tm._new_run, "resume": tm._old_run}[mode]
        envs, _, out = open_run(given, {"vector": "async"} if mode == "env" else {}, stack)
        assert str(out / "progress.csv") in [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
        for process in envs.processes:
            files = [os.path.realpath(each) for each in Path(f"/proc/{process.pid}/fd").iterdir()]
            assert str(out / "progress.csv") not in files


def test_a_run_is_resumed_by_one_process_at_a_time_by_its_folder_or_checkpoint(run_folder, capsys):
    with open(run_folder / "progress.csv", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert tm.main(["--resume", str(run_folder), "--total-steps", "320"]) == 2
        assert "in use by another process" in capsys.readouterr().err
    main("--resume", run_folder / "checkpoint.npz", "--total-steps", 320, "--quiet")
    record = json.loads((run_folder / "config.json").read_text())
    assert (record["config"]["total_steps"], tm.load(run_folder).steps) == (320, 320)
    assert record["resumed_after_steps"] == 160


# The number of processes killed; the figure in the README is of KILLS=200.
KILLS = int(os.environ.get("KILLS", 10))


@pytest.mark.slow
def test_a_run_killed_at_any_moment_loads_and_resumes_with_every_finished_update(tmp_path):
    rng, out, inside, updates = np.random.default_rng(0), tmp_path / "run", 0, 0
    quick = [*QUICK, "--total-steps", "100_000_000", "--out", out]
    for _ in range(KILLS):
        known = (out / "checkpoint.npz").stat().st_mtime_ns if out.exists() else None  # until that changes, it starts
        argv = ["--resume", out, "--quiet"] if out.exists() else ["--env", "CartPole-v1", *quick]
        command = [sys.executable, HERE / "trpo_min.py", *map(str, argv)]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
        while not (out / "checkpoint.npz").exists() or (out / "checkpoint.npz").stat().st_mtime_ns == known:
            assert process.poll() is None, process.stderr.read()
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
        state, rows = tm.load(out), tm.read_progress(out)
        inside += any(path.name.startswith("checkpoint.npz.") for path in out.iterdir())
        assert state.updates > updates or known is None
        assert [row["update"] for row in rows][: state.updates] == list(range(1, state.updates + 1))
        assert len(rows) <= state.updates + 1
        updates = state.updates
    print(f"{KILLS} killed, {inside} inside the write of a checkpoint, {updates} updates")
    main("--resume", out, "--total-steps", 16 * (updates + 5), "--quiet")
    assert tm.load(out).updates == updates + 5
    assert sorted(contents(out)) == ["checkpoint.npz", "config.json", "progress.csv"]


def in_a_namespace(script):
    """Runs a shell script that may mount file systems of its own; they are gone when it ends."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (needs Linux, unshare and user namespaces)")
    return ["unshare", "-rm", "bash", "-c", script]


TRAIN = f"{sys.executable} {HERE / 'trpo_min.py'} --env CartPole-v1 {' '.join(QUICK)} --total-steps 10_000_000"


@pytest.mark.parametrize("fault", ["full", "read-only", "deleted"])
def test_a_folder_that_can_no_longer_be_written_to_ends_the_run_with_its_state_saved_elsewhere(tmp_path, fault):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {disk} && " if fault != "deleted" else ""
    wait = f"while ! grep -qs ^5, {disk}/run/progress.csv; do :; done; "
    then = {
        "full": "",
        "read-only": f"({wait} until mount -o remount,ro {disk} 2> /dev/null; do :; done) & ",
        "deleted": f"({wait} mv {disk} {disk}.old; rm -r {disk}.old) & ",
    }[fault]
    script = f"{mount} {then} {TRAIN} --out {disk}/run"
    result = subprocess.run(in_a_namespace(script), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    (sentence,) = result.stderr.splitlines()
    assert {"full": "No space left", "read-only": "Read-only", "deleted": "No such file"}[fault] in sentence
    folder = Path(sentence.split("is saved in ")[1])
    state = tm.load(tmp_path / folder)
    assert state.updates >= 4 and f"{state.steps:,} steps" in sentence
    main("--resume", tmp_path / folder, "--total-steps", state.steps + 32, "--quiet")
    assert tm.load(tmp_path / folder).updates == state.updates + 2


# ============================================================================= several ranks: one update, on MPI or not
class Ranks:
    """A communicator like mpi4py's whose ranks are threads of this process; it notes the size of what is sent."""

    def __init__(self, n):
        self.size, self.barrier, self.slots, self.local = n, threading.Barrier(n), [None] * n, threading.local()
        self.sent = []

    @property
    def rank(self):
        return self.local.rank

    def allgather(self, x):
        self.slots[self.rank] = x
        self.barrier.wait(60)
        gathered = list(self.slots)
        self.barrier.wait(60)
        if self.rank == 0:
            self.sent.append(np.size(x))
        return gathered

    def allreduce(self, x, op=operator.add):
        return functools.reduce(op, self.allgather(x))

    def Allreduce(self, x, total):
        total[...] = sum(self.allgather(x))

    def bcast(self, x):
        return self.allgather(x)[0]

    def run(self, work):
        """[work(rank)] of all ranks; or what one of them raised."""

        def one(rank):
            self.local.rank = rank
            try:
                return work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with tm.data_parallel(self), ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.size)]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]


@st.composite
def shares(draw, n, most=3):
    """Slices that give each of up to so many ranks some of n things, one at least."""
    ranks = draw(st.integers(min(n, 2), min(n, most)))
    inner = draw(st.lists(st.integers(1, n - 1), min_size=ranks - 1, max_size=ranks - 1, unique=True)) if n > 1 else []
    return [slice(a, b) for a, b in pairwise([0, *sorted(inner), n])]


def part(batch, rows):
    """Some rows of a batch; in groups, some of the groups."""
    rows = slice(rows.start * batch.group, rows.stop * batch.group)
    weights = batch.weights[rows] if np.ndim(batch.weights) else batch.weights
    return tm.Batch(*(each[rows] for each in batch[:4]), weights, batch.group)


@given(gentle(), st.integers(1, 3), st.data())
def test_an_update_of_several_ranks_is_that_of_one_process_on_the_joined_batch(case, group, data):
    case, batch = grouped(mild(case), group)
    cuts = data.draw(shares(len(case.obs) // group))
    # solved to the end: a solve that stops on its way amplifies the rounding of the ranks' sums without a useful bound
    config = tm.Config(cg_iters=500, cg_tol=1e-9)
    theta, info = tm.trpo_update(case.policy, case.theta, batch, config)
    results = Ranks(len(cuts)).run(
        lambda rank: tm.trpo_update(case.policy, case.theta, part(batch, cuts[rank]), config)
    )
    for other, other_info in results:
        assert other.tobytes() == results[0][0].tobytes() and str(other_info) == str(results[0][1])
    assume(info.accepted == results[0][1].accepted)  # but for a tie, which rounding decides
    assume(info.grad_norm > 1e-6)  # that of equal actions in one state is 0 but for rounding, which has any direction
    # two residuals of 1e-9 over a damping of 0.1, F up to 100; a share left out shows in the first digits
    assert np.abs(results[0][0] - theta).max() <= 1e-6 * np.abs(theta).max()
    for name in ("kl", "kl_largest", "adv_largest", "entropy", "surrogate", "surrogate_old", "grad_norm", "curvature"):
        assert isclose(getattr(results[0][1], name), getattr(info, name), rtol=1e-6, atol=1e-9), name


@given(cases(), st.data())
def test_fvp_of_several_ranks_is_that_of_all_rows(case, data):
    v, cuts = case.rng.normal(size=case.theta.shape), data.draw(shares(len(case.obs)))
    results = Ranks(len(cuts)).run(lambda rank: tm.fvp(case.policy, case.theta, case.obs[cuts[rank]], v, 0.1))
    whole = tm.fvp(case.policy, case.theta, case.obs, v, 0.1)
    assert (np.abs(results - whole) <= tolerance(case, bound_fvp(case, v))).all()


@given(cases(heads=("value",), scales=(0.3, 1.0)), st.data())
def test_a_value_fit_of_several_ranks_is_that_of_all_rows(case, data):
    """Solved to the end: an unfinished solve may stop an iteration earlier or later by rounding."""
    returns, cuts = case.rng.normal(size=len(case.obs)), data.draw(shares(len(case.obs)))
    config = tm.Config(value_damping=0.1, cg_iters=300, cg_tol=1e-8)
    fit = functools.partial(tm.fit_value, case.policy, case.theta, config=config)
    whole = fit(case.obs, returns)
    results = Ranks(len(cuts)).run(lambda rank: fit(case.obs[cuts[rank]], returns[cuts[rank]]))
    assert all(phi.tobytes() == results[0].tobytes() for phi in results)
    errors = [np.square(tm.forward(case.policy, phi, case.obs)[:, 0] - returns).mean() for phi in (whole, results[0])]
    assert isclose(*errors, rtol=1e-6, atol=1e-9)


@given(st.integers(2, 3), st.integers(1, 3), st.integers(1, 12), st.integers(0, 2**32))
def test_an_iteration_of_several_ranks_is_that_of_one_process_with_all_of_their_environments(R, E, n_steps, seed):
    envs = [counters(E, AutoresetMode.NEXT_STEP, rank * E) for rank in range(R)]
    solved = {"cg_iters": 500, "cg_tol": 1e-9, "value_damping": 0.1}  # to the end
    config, rng = tm.Config(rollout_steps=n_steps, **solved), np.random.default_rng(seed)
    policy = tm.make_policy(envs[0].single_observation_space, envs[0].single_action_space, (8,))
    state = tm.init_state("Counter", policy, config, seed)
    rollouts = []
    for each in envs:
        runner = tm._first_runner(each, int(rng.integers(2**31)))
        rollouts.append(tm.collect(each, policy, state.theta, state.obs_stats, runner, rng, n_steps)[0])
    arrays = [np.concatenate([r[k] for r in rollouts], axis=1) for k in range(9)]
    final_at = [(t, e + rank * E) for rank, r in enumerate(rollouts) for t, e in r.final_at]
    lists = [[each for r in rollouts for each in r[k]] for k in (11, 12, 13)]
    last_obs = np.concatenate([r.last_obs for r in rollouts])
    joined = tm.Rollout(*arrays, last_obs, final_at, *lists)
    whole, _, explained = tm.learn(state, joined)
    for other, _, other_explained in Ranks(R).run(lambda rank: tm.learn(state, rollouts[rank])):
        for name in ("theta", "phi"):
            mine, theirs = getattr(whole, name), getattr(other, name)
            assert np.abs(mine - theirs).max() <= 1e-6 * np.abs(mine).max()  # as of one update
        for name in ("obs_stats", "reward_stats"):
            for mine, theirs in zip(getattr(whole, name), getattr(other, name), strict=True):
                assert allclose(mine, theirs, 1e-12, 1e-12)
        assert (whole.steps, whole.episodes, whole.returns) == (other.steps, other.episodes, other.returns)
        assert isclose(explained, other_explained, 1e-9, 1e-9)


@pytest.mark.parametrize("n", [50, 500])
def test_what_the_ranks_send_each_other_grows_with_the_parameters_and_not_with_the_rows(n):
    """The gradient, the preconditioner's factors, each of 4 products F v; and a few numbers, two of them a candidate of
    the line search."""
    case, ranks, config = fixed_case("gaussian", n), Ranks(2), CONFIG._replace(cg_tol=0.0)
    batch, cuts = make_batch(case), [slice(0, 1), slice(1, n)]
    results = ranks.run(lambda rank: tm.trpo_update(case.policy, case.theta, part(batch, cuts[rank]), config))
    large = [size for size in ranks.sent if size > 2]
    factors = [size**2 + 1 for m, n in reversed(list(pairwise(case.policy.sizes))) for size in (m + 1, n)]
    assert large == [len(case.theta) + 1, *factors, *[len(case.theta) + 1] * 4]
    assert len(ranks.sent) - len(large) <= 8 + 2 * results[0][1].backtracks


@pytest.mark.parametrize("sampling", ["single_path", "vine"])
def test_ranks_train_on_rows_of_their_own_to_one_state_that_repeats_bit_for_bit(sampling, monkeypatch):
    config = tm.Config(total_steps=3000, num_envs=2, rollout_steps=400, sampling=sampling, vine_states=4, hidden=(8,))
    collect, rows = tm.collect, []

    def noted(*args):
        rollout, runner = collect(*args)
        rows.append(rollout.raw_obs)
        return rollout, runner

    monkeypatch.setattr(tm, "collect", noted)
    work = functools.partial(tm.train, "CartPole-v1", config, seed=5)
    states = Ranks(3).run(lambda rank: work()) + Ranks(3).run(lambda rank: work())
    assert all(same(states[0], each) for each in states)
    assert states[0].updates > 1 and 3000 - 2 * 3 * 400 < states[0].steps <= 3000
    assert len({each.tobytes() for each in rows[:3]}) == 3


def test_a_callback_of_any_rank_stops_them_all():
    ranks, config = Ranks(2), tm.Config(total_steps=4000, num_envs=2, rollout_steps=64, hidden=(8,))
    stop_at = lambda state, *_: ranks.rank == 1 and state.updates == 2  # noqa: E731
    assert [s.updates for s in ranks.run(lambda rank: tm.train("CartPole-v1", config, callback=stop_at))] == [2, 2]


def test_vine_takes_no_more_states_than_there_are_steps_to_branch_from():
    config = tm.Config(sampling="vine", num_envs=4, rollout_steps=5, vine_states=8, vine_steps=2, total_steps=60)
    assert tm.train("CartPole-v1", config).updates >= 2


def test_the_plan_of_vine_counts_the_environments_of_all_ranks():
    policy = tm.Policy((4, 2), "categorical", (2,))

    def plan(num_envs):
        config = tm.Config(sampling="vine", num_envs=num_envs)
        return tm._vine_plan(tm._make_envs("CartPole-v1", config)[0], policy, config)

    assert Ranks(3).run(lambda rank: plan(2)) == [plan(6)] * 3


def test_ranks_that_come_apart_are_noticed_at_that_update(monkeypatch):
    ranks = Ranks(2)
    monkeypatch.setattr(tm, "fit_value", lambda value, phi, *_: phi + (ranks.rank == 1) * 1e-16 * np.arange(len(phi)))
    with pytest.raises(RuntimeError, match="differ in what update 1 came to"):
        ranks.run(lambda rank: tm.train("CartPole-v1", tm.Config(total_steps=2000, num_envs=2, hidden=(8,))))


def test_ranks_that_start_from_other_parameters_seeds_or_settings_are_refused():
    case, config = fixed_case(), tm.Config(hidden=(8,))
    batch, other = make_batch(case), config._replace(max_kl=0.5)
    for work in (
        lambda rank: tm.train("CartPole-v1", config, seed=rank),
        lambda rank: tm.trpo_update(case.policy, case.theta + 1e-13 * rank, batch, config),
        lambda rank: tm.trpo_update(case.policy, case.theta, batch, (config, other)[rank]),
    ):
        with pytest.raises(RuntimeError, match="the same seed and config"):
            Ranks(2).run(work)
    with pytest.raises(ValueError, match="communicator"), tm.data_parallel("MPI"):
        pass


MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
needs_mpi = pytest.mark.skipif(
    not (MPIRUN and importlib.util.find_spec("mpi4py")), reason='needs mpi4py and mpirun: pip install ".[mpi]"'
)


def mpirun(n, *argv, cwd):
    """A process of n ranks of trpo_min.py, on however few cores and as whatever user."""
    env = os.environ | {
        "PYTHONPATH": f"{HERE}{os.pathsep}{cwd}",
        "NUMBA_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    command = [MPIRUN, "-n", n, sys.executable, HERE / "trpo_min.py", *argv]
    return subprocess.Popen(
        [*map(str, command)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # mpirun ends its ranks
        raise
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("trpo_min:")], err


RANKS = ["--env", "CartPole-v1", "--num-envs", "2", "--rollout-steps", "96", "--hidden", "8", "--no-stop-when-solved"]
RANKS += ["--vector", "sync"]


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_a_run_of_several_ranks_repeats_bit_for_bit_and_goes_on_with_the_same_or_another_number(n, tmp_path):
    for name in ("one", "two"):
        code, out, _, err = finish(mpirun(n, *RANKS, "--total-steps", 960, "--out", name, cwd=tmp_path))
        assert code == 0 and f"in {n} ranks of 2 environments" in out and out.count("trained CartPole-v1") == 1, err
    one, two = (tm.load(tmp_path / name) for name in ("one", "two"))
    assert same(one, two) and (one.steps, one.updates) == (960, 10)
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    assert sorted(contents(tmp_path / "one")) == ["checkpoint.npz", "config.json", "progress.csv"]
    for ranks, name in ((n, "one"), (5 - n, "two"), (1, "two")):
        before = tm.load(tmp_path / name)
        argv = ["--resume", name, "--total-steps", before.steps + 96]
        assert finish(mpirun(ranks, *argv, cwd=tmp_path))[0] == 0
        assert tm.load(tmp_path / name).updates == before.updates + 1
        assert len(tm.read_progress(tmp_path / name)) == before.updates + 1


FAULTY_RANK = """
import os, gymnasium as gym, numpy as np
class Env(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
    def __init__(self, fault): self.fault, self.n = fault, 0
    def reset(self, *, seed=None, options=None): return np.zeros(2, np.float32), {}
    def step(self, action):
        self.n += 1
        late = self.n > 200 and os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1"
        if late and self.fault == "raises": raise RuntimeError("the robot fell off the table")
        if late and self.fault == "signal" and not signalled: signalled.append(os.kill(os.getpid(), 15))
        obs = np.full(2, np.nan if late and self.fault == "NaN" else 0, np.float32)
        return obs, float(action), self.n % 20 == 0, False, {}
signalled = []
gym.register("Faulty-v0", Env)
"""


@needs_mpi
@pytest.mark.parametrize(("fault", "message"), [("raises", "the robot fell off the table"), ("NaN", "NaN or infinity")])
def test_a_rank_that_fails_ends_them_all_with_its_sentence_and_what_was_learned_saved(fault, message, tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_RANK)
    argv = ["--env", "faulty:Faulty-v0", "--env-args", json.dumps({"fault": fault}), *RANKS[2:], "--out", "run"]
    code, _, sentences, err = finish(mpirun(2, *argv, cwd=tmp_path))
    assert code in (1, 2) and len(sentences) == 1, err
    assert (
        "rank 1" in sentences[0] and message in sentences[0] and "run holds the state after 768 steps" in sentences[0]
    )
    assert tm.load(tmp_path / "run").updates == len(tm.read_progress(tmp_path / "run")) == 8  # of 24 steps each


@needs_mpi
def test_a_signal_to_mpirun_stops_all_ranks_with_what_was_learned_saved(tmp_path):
    process = mpirun(2, *RANKS, "--total-steps", 10**7, "--out", "run", "--quiet", cwd=tmp_path)
    while not (tmp_path / "run" / "progress.csv").exists() or len(tm.read_progress(tmp_path / "run")) < 3:
        assert process.poll() is None, process.stderr.read()
    process.terminate()
    assert finish(process)[0] != 0
    state = tm.load(tmp_path / "run")
    assert state.updates >= 3
    code, *_, err = finish(mpirun(2, "--resume", "run", "--total-steps", state.steps + 96, cwd=tmp_path))
    assert code == 0 and tm.load(tmp_path / "run").updates == state.updates + 1, err


@needs_mpi
def test_a_signal_to_any_rank_stops_them_all_after_the_update_with_its_exit_code(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY_RANK)
    argv = ["--env", "faulty:Faulty-v0", "--env-args", '{"fault": "signal"}', *RANKS[2:], "--out", "run", "--quiet"]
    code, out, _, err = finish(mpirun(2, *argv, cwd=tmp_path))
    assert code == 128 + signal.SIGTERM and out.startswith("stopped"), err
    assert tm.load(tmp_path / "run").updates == 9  # the one in which it came


@needs_mpi
@pytest.mark.parametrize("argv", [["--env", "Nope-v1"], ["--env", "CartPole-v1", "--gama", "1"], ["--eval", "nothing"]])
def test_misuse_under_mpirun_is_one_sentence_of_the_first_rank(argv, tmp_path):
    code, _, sentences, err = finish(mpirun(2, *argv, cwd=tmp_path))
    assert code == 2 and len(sentences) == 1 and "rank" not in sentences[0], err


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_fails_of_misuse_so_that_no_other_ends_it_before_it_says_so(rank, tmp_path):
    result = run(tm.__file__, "--gama", "1", cwd=tmp_path, PMI_RANK=str(rank), PMI_SIZE="2")
    assert (result.returncode, len(result.stderr.splitlines())) == ((2, 1), (0, 0))[rank]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_without_mpi4py_are_told_its_extra_once(rank, tmp_path):
    script = "import sys; sys.modules['mpi4py'] = None; import trpo_min; sys.exit(trpo_min.main(['--env', 'A-v0']))"
    result = run("-c", script, cwd=tmp_path, PMI_RANK=str(rank), PMI_SIZE="2")
    assert result.returncode == 2 and os.listdir(tmp_path) == []
    assert len(result.stderr.splitlines()) == 1 - rank
    assert rank or "needs mpi4py: pip install mpi4py, or the extra mpi of trpo-min" in result.stderr


# ============================================================================================ watching and playing
def test_evaluation_from_the_shell_says_what_evaluate_returns_and_changes_no_byte(run_folder, capsys):
    before = contents(run_folder)
    main("--eval", run_folder, "--episodes", 7, "--seed", 3)
    returns, lengths = tm.evaluate(tm.load(run_folder), "CartPole-v1", episodes=7, seed=3)
    assert capsys.readouterr().out == (
        f"CartPole-v1, 7 episodes: return {returns.mean():.1f} +- {returns.std():.1f}, from {returns.min():.1f} to "
        f"{returns.max():.1f}; length {lengths.mean():.1f}, from {lengths.min()} to {lengths.max()}\n"
    )
    assert contents(run_folder) == before


class Listed(gym.Env):
    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)

    def __init__(self, items):
        assert isinstance(items, list)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_a_list_among_the_environment_arguments_is_a_list_again_when_resumed(tmp_path):
    gym.register("Listed-v0", Listed)
    argv = ["--env", "Listed-v0", "--env-args", '{"items": [1, 2]}', *QUICK]
    main(*argv, "--total-steps", 16, "--out", tmp_path / "run")
    main("--resume", tmp_path / "run", "--total-steps", 32)
    del gym.registry["Listed-v0"]
    assert tm.load(tmp_path / "run").env_args == {"items": [1, 2]}


def test_no_limit_to_the_steps_of_an_episode_is_kept_as_what_gymnasium_takes_for_none():
    endless = tm.train(gym.make("Pendulum-v1", max_episode_steps=-1), tm.Config(total_steps=300, hidden=(4,)))
    assert endless.episodes == 0 and gym.make(endless.env, **endless.env_args).spec.max_episode_steps is None


def test_what_the_environment_was_made_with_is_kept_by_train_too(tmp_path, capsys):
    config = tm.Config(total_steps=300, rollout_steps=100, hidden=(4,))
    lake = tm.train(lambda: gym.make("FrozenLake-v1", is_slippery=False, render_mode="ansi"), config)
    assert lake.env_args == {"map_name": "4x4", "is_slippery": False}
    short = tm.train(gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 30), config)
    tm.save(short, tmp_path / "checkpoint.npz")
    main("--eval", tmp_path, "--episodes", 2)
    assert "length 30.0, from 30 to 30" in capsys.readouterr().out
    assert set(tm.evaluate(short, "Pendulum-v1", 2)[1]) == {30}
    more = tm.train("Pendulum-v1", config._replace(total_steps=600), state=short)
    assert set(more.lengths) == {30} and more.env_args == short.env_args
    assert tm.train("CartPole-v1", config).env_args == {}
    for mode in ("sync", "vector_entry_point"):
        state = tm.train(gym.make_vec("CartPole-v1", 3, mode, sutton_barto_reward=True), config)
        assert state.env_args["sutton_barto_reward"]
        gym.make(state.env, **state.env_args)
    gym.register("Held-v0", lambda held: gym.make("CartPole-v1").unwrapped)
    assert tm.train(lambda: gym.make("Held-v0", held={1}), config).env_args == {}  # no JSON
    del gym.registry["Held-v0"]


def test_the_module_of_an_environment_is_kept_by_train_too(tmp_path, monkeypatch):
    lines = "import gymnasium", "entry = 'gymnasium.envs.classic_control:PendulumEnv'"
    (tmp_path / "registers.py").write_text("\n".join((*lines, "gymnasium.register('There-v0', entry, None, False, 9)")))
    monkeypatch.syspath_prepend(tmp_path)
    state = tm.train("registers:There-v0", tm.Config(total_steps=300, rollout_steps=100, hidden=(4,)))
    tm.save(state, tmp_path / "checkpoint.npz")
    del gym.registry["There-v0"], sys.modules["registers"]
    main("--eval", tmp_path, "--episodes", 2)
    assert set(tm.evaluate(state, state.env, 2)[1]) == {9}


def test_bounds_of_any_type_can_be_saved(tmp_path):
    class Long(Counter):
        action_space = spaces.Box(-1.0, 1.0, (1,), np.longdouble)

    state = tm.train(Long, tm.Config(total_steps=100, rollout_steps=50, hidden=(4,)))
    tm.save(state, tmp_path / "checkpoint.npz")
    assert same(tm.load(tmp_path), state)


def test_environment_arguments_are_kept_for_evaluation_and_resuming(tmp_path, capsys):
    args = '{"max_episode_steps": 7}'
    main("--env", "Pendulum-v1", "--env-args", args, *QUICK, "--total-steps", 32, "--out", tmp_path / "run")
    main("--resume", tmp_path / "run", "--total-steps", 64, "--quiet")
    assert set(tm.load(tmp_path / "run").lengths) == {7}
    capsys.readouterr()
    main("--eval", tmp_path / "run")
    assert "length 7.0, from 7 to 7" in capsys.readouterr().out
    main("--eval", tmp_path / "run", "--env-args", '{"max_episode_steps": 9}')
    assert "length 9.0, from 9 to 9" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # what moviepy and pygame have to say
def test_episodes_are_recorded_and_shown(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    main("--eval", run_folder, "--episodes", 2, "--video", tmp_path / "videos")
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    assert len(videos) == 2 and all(b"ftyp" in path.read_bytes()[:16] for path in videos)
    main("--eval", run_folder, "--episodes", 1, "--render")
    with pytest.raises(SystemExit, match="2"):
        tm.main(["--eval", str(run_folder), "--video", "x", "--render"])


def test_a_loaded_state_acts_on_one_observation_or_on_a_batch(run_folder):
    state, obs = tm.load(run_folder), np.random.default_rng(0).normal(size=(5, 4))
    actions = state.act(obs)
    assert (actions == tm.act(state.policy, state.theta, obs, state.obs_stats)).all()
    assert [state.act(row) for row in obs] == actions.tolist()


@pytest.mark.slow
def test_on_a_terminal_of_80_columns_there_is_a_progress_bar_in_one_line(tmp_path):
    import pty

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, str(HERE / "trpo_min.py"), "--env", "Acrobot-v1", "--total-steps", "5000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=follower, stderr=follower)
    os.close(follower)
    output = b""
    with contextlib.suppress(OSError):  # the end, on Linux
        while data := os.read(leader, 4096):
            output += data
    os.close(leader)
    assert process.wait() == 0
    bars = [line for line in output.decode().split("\r") if "%|" in line]
    assert all(text in bars[-1] for text in ("100%", "5.00k/5.00k", "return ", "KL 0.0", "step/s"))
    assert max(len(line.rstrip("\n")) for line in bars) <= 80


def tensorboard_scalars(path):
    """(tag, step, value) of each scalar of an event file: records of length, 4 bytes, message, 4 bytes."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)
        data = data[16 + length :]


@pytest.mark.filterwarnings("ignore")  # of protobuf
def test_event_files_hold_what_progress_csv_does(tmp_path):
    main("--env", "CartPole-v1", *QUICK, "--total-steps", 800, "--tensorboard", "--out", tmp_path / "run")
    (path,) = (tmp_path / "run").glob("events.*")
    scalars = {(tag, step): value for tag, step, value in tensorboard_scalars(path)}
    rows = tm.read_progress(tmp_path / "run")
    assert len(scalars) == sum(map(len, rows))
    for row in rows:
        seen = {name: scalars[name, row["steps"]] for name in row}
        assert seen == pytest.approx(row, rel=1e-6, nan_ok=True)


def test_learning_curves_have_a_panel_for_each_environment_and_a_band_for_several_seeds(tmp_path, monkeypatch):
    figures = []
    for seed in range(3):
        main("--env", "CartPole-v1", *QUICK, "--total-steps", 800, "--seed", seed, "--out", tmp_path / f"c{seed}")
    main("--env", "CartPole-v1", *QUICK, "--total-steps", 800, "--gamma", 0.9, "--out", tmp_path / "other")
    main("--env", "Pendulum-v1", *QUICK, "--total-steps", 800, "--out", tmp_path / "p")
    from matplotlib.figure import Figure

    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, old=Figure.savefig, **k: (figures.append(self), old(self, *a, **k))
    )
    folders = [tmp_path / name for name in ("c0", "c1", "c2", "other", "p")]
    main("--plot", *folders, "--out", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    first, second = figures[0].axes
    assert (first.get_title(), second.get_title()) == ("CartPole-v1", "Pendulum-v1")
    assert [line.get_label() for line in first.lines] == [
        "gamma 0.995: 3 runs, mean and 95% interval", "gamma 0.9: 1 run, mean, smallest and largest"
    ]  # fmt: skip
    rows = [np.array([(r["steps"], r["return_mean"]) for r in tm.read_progress(f) if r["episodes"]]) for f in folders]
    steps, mean = first.lines[0].get_data()
    expected = np.mean([np.interp(steps, *row.T) for row in rows[:3]], axis=0)
    assert allclose(mean, expected)
    values = np.array([np.interp(steps[-1], *row.T) for row in rows[:3]])
    low, high = scipy.stats.t.interval(0.95, 2, values.mean(), scipy.stats.sem(values))
    band = first.collections[0].get_paths()[0].vertices
    at_the_end = band[np.isclose(band[:, 0], steps[-1]), 1]
    assert (at_the_end.min(), at_the_end.max()) == pytest.approx((low, high), rel=1e-9)
    main("--env", "CartPole-v1", *QUICK, "--total-steps", 400, "--out", tmp_path / "short")
    main("--plot", tmp_path / "c0", tmp_path / "short", "--out", tmp_path / "curves.png")
    assert [line.get_label()[:23] for line in figures[1].axes[0].lines] == [
        "total_steps 800: 1 run,",
        "total_steps 400: 1 run,",
    ]
    with pytest.raises(ValueError, match="a folder: give the name of a file"):
        tm.plot(folders[:1], tmp_path)
    with pytest.raises(ValueError, match=r"x\.foo: its name must end in one of .* pdf, .* png, "):
        tm.plot(folders[:1], tmp_path / "x.foo")


def test_what_a_learning_curve_spans_is_from_the_smallest_return_to_the_largest(run_folder):
    steps, mean, low, high = tm._curve([rows := tm.read_progress(run_folder)[3:]])
    assert low.tolist() == [row["return_min"] for row in rows] and (low < high).any()
    assert high.tolist() == [row["return_max"] for row in rows] and mean.tolist() == [r["return_mean"] for r in rows]
    assert steps.tolist() == [row["steps"] for row in rows]


def test_runs_of_other_lengths_are_one_curve_where_their_length_does_not_set_max_kl(tmp_path, monkeypatch):
    labels, steps = [], (320, 400)
    for n in steps:
        main(
            "--env", "CartPole-v1", *QUICK, "--kl-schedule", "constant", "--total-steps", n, "--out", tmp_path / str(n)
        )
    from matplotlib.axes import Axes

    monkeypatch.setattr(Axes, "legend", lambda axis: labels.extend(line.get_label() for line in axis.lines))
    tm.plot([tmp_path / str(n) for n in steps], tmp_path / "x.png")
    assert labels == ["2 runs, mean and 95% interval"]


def test_runs_without_a_finished_episode_are_left_out_of_a_plot_with_a_word(run_folder, tmp_path):
    main("--env", "Pendulum-v1", *QUICK, "--total-steps", 32, "--out", tmp_path / "early")
    with pytest.warns(UserWarning, match="early has no finished episode to plot"):
        tm.plot([tmp_path / "early", run_folder / "checkpoint.npz"], tmp_path / "x.svg")
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()
    with (
        pytest.warns(UserWarning, match="early has no finished"),
        pytest.raises(ValueError, match="there is no run with a finished episode to plot"),
    ):
        tm.plot([tmp_path / "early"], tmp_path / "y.png")


@pytest.mark.parametrize(
    ("module", "extra", "argv"),
    [
        ("matplotlib", "plot", ["--plot", "run"]),
        ("moviepy", "video", ["--eval", "run", "--video", "videos"]),
        ("tensorboardX", "tensorboard", ["--env", "CartPole-v1", "--tensorboard", "--out", "new"]),
    ],
)
def test_what_is_not_installed_is_named_with_its_extra_in_one_line(run_folder, module, extra, argv):
    script = f"import sys; sys.modules[{module!r}] = None; import trpo_min; sys.exit(trpo_min.main({argv}))"
    result = run("-c", script, cwd=run_folder.parent)
    assert result.returncode == 2
    assert f"needs {module}: pip install {module}, or the extra {extra} of trpo-min" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert os.listdir(run_folder.parent) == ["run"]


def readme_blocks(language, containing):
    text = (HERE / "README.md").read_text()
    return [block for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if containing in block]


@pytest.mark.slow
@pytest.mark.parametrize("containing", ["gym.Env", "trpo_update", "load("])
def test_the_readmes_examples_run_in_a_folder_that_holds_the_file_alone(tmp_path, containing):
    (tmp_path / "trpo_min.py").write_text((HERE / "trpo_min.py").read_text())
    blocks = readme_blocks("python", containing)
    assert blocks
    for block in blocks:
        result = run("-c", block, cwd=tmp_path, PYTHONPATH="")
        assert result.returncode == 0, result.stderr
        if containing == "trpo_update":
            result = run("-c", "import sys; sys.modules['gymnasium'] = None\n" + block, cwd=tmp_path, PYTHONPATH="")
            assert result.returncode == 0, result.stderr


# ============================================================================================ faults and fuzz
class Odd(gym.Env):
    """An environment with a fault, from its 60th step on."""

    def __init__(self, fault):
        self.fault, self.steps, self.t = fault, 0, 0
        D = {"wide": 10_000, "one state": 1, "one-dimensional": 1}.get(fault, 3)
        self.observation_space = spaces.Discrete(1) if fault == "one state" else spaces.Box(-1, 1, (D,))
        self.action_space = spaces.Discrete(1) if fault == "one action" else spaces.Box(-1, 1, (1,))

    def observe(self):
        late = self.steps > 60
        if self.fault == "one state":
            return 0
        obs = self.np_random.uniform(-1, 1, self.observation_space.shape).astype(np.float32)
        obs[0] = {"nan obs": np.nan, "infinite obs": np.inf}.get(self.fault, obs[0]) if late else obs[0]
        return np.append(obs, obs) if late and self.fault == "shape" else obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.fault == "reset raises" and self.steps > 60:
            raise RuntimeError("the door is stuck")
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.steps, self.t = self.steps + 1, self.t + 1
        if self.fault == "step raises" and self.steps > 60:
            raise RuntimeError("the floor is gone")
        reward = -float(np.square(action).sum())
        reward = {"nan reward": np.nan if self.steps > 60 else 0.0, "huge": 1e30 * reward, "zero": 0.0}.get(
            self.fault, reward
        )
        ended = {"endless": False, "short": True}.get(self.fault, self.t == 9)
        return self.observe(), reward, ended, False, {}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # Gymnasium's, of the same faults
@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("nan reward", 2, "a reward of nan"), ("nan obs", 2, "observation with NaN"), ("shape", 2, "wrong shape"),
        ("infinite obs", 2, "observation with NaN or infinity"), ("step raises", 1, "the floor is gone"),
        ("reset raises", 1, "the door is stuck"), ("endless", 0, ""), ("short", 0, ""), ("one state", 0, ""),
        ("huge", 0, ""), ("zero", 0, ""), ("one action", 0, ""), ("one-dimensional", 0, ""),
        pytest.param("wide", 0, "", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_environment_that_misbehaves_is_learned_from_or_named_with_what_was_learned_saved(
    tmp_path, fault, code, message, capsys
):
    gym.register("Odd-v0", Odd)
    argv = ["--env", "Odd-v0", "--env-args", json.dumps({"fault": fault}), *QUICK, "--total-steps", "320"]
    assert tm.main([*argv, "--out", str(tmp_path / "run")]) == code
    del gym.registry["Odd-v0"]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == (code > 0) and all(message in line for line in errors)
    state = tm.load(tmp_path / "run")
    assert state.updates == (20 if code == 0 else 3)
    assert np.isfinite(state.theta).all() and np.isfinite(state.phi).all()


def test_a_float32_step_whose_kl_is_above_max_kl_by_a_rounding_is_refused(monkeypatch):
    """0.1 rounded to float32 is above 0.1, and equal to it where the comparison is in float32."""
    case = fixed_case()
    theta, obs = case.theta.astype(np.float32), case.obs.astype(np.float32)
    mu = tm.forward(case.policy, theta, obs)
    batch = tm.Batch(obs, tm.sample(case.policy, mu, case.rng), case.rng.normal(size=len(obs)), mu)
    assert tm.trpo_update(case.policy, theta, batch, tm.Config(max_kl=0.1))[1].accepted
    monkeypatch.setattr(tm, "kl", lambda policy, old, new: np.full(len(new), 0.1, np.float32))
    assert not tm.trpo_update(case.policy, theta, batch, tm.Config(max_kl=0.1))[1].accepted


# The figures in the README are of HYPOTHESIS_PROFILE=fuzz, 100,000 cases.
extremes = st.sampled_from([0.0, 1e-300, 1e-30, 1.0, 1e30, 1e300])


@given(
    cases(max_rows=20, wide=6, scales=(0.0, 0.3, 30.0, 1e6)),
    extremes,
    extremes,
    st.floats(-12, 4),
    st.booleans(),
    seeds,
)
def test_fuzz_no_batch_breaks_an_update(case, size, weight, log_kl, single, seed):
    policy, theta, rng = case.policy, case.theta, np.random.default_rng(seed)
    if policy.head == "gaussian":
        theta[-policy.sizes[-1] :] = rng.uniform(-20, 5, policy.sizes[-1])
    theta = theta.astype(np.float32 if single else np.float64)
    obs = np.tile(case.obs[:1], (len(case.obs), 1)) if rng.random() < 0.2 else case.obs
    mu = tm.forward(policy, theta, obs)
    adv = np.clip(size * rng.normal(size=len(obs)), -np.finfo(theta.dtype).max, np.finfo(theta.dtype).max)
    adv = np.where(rng.random(len(obs)) < 0.1, 0, adv)
    weights = np.clip(weight * rng.random(len(obs)), 0, np.finfo(theta.dtype).max) if rng.random() < 0.5 else 1.0
    batch = tm.Batch(obs, tm.sample(policy, mu, rng), adv, mu, weights)
    config = tm.Config(
        max_kl=10**log_kl, damping=rng.choice([0, 1e-8, 0.1]), cg_iters=int(rng.integers(1, 30)),
        cg_tol=rng.choice([0, 0.1]), backtrack_coef=rng.uniform(0.01, 0.99), max_backtracks=int(rng.integers(1, 20)),
    )  # fmt: skip
    try:
        new, info = tm.trpo_update(policy, theta, batch, config)
    except ValueError as error:
        assert f"must be of a size {theta.dtype} can hold" in str(error)
        event("refused: weights times adv overflow")
        return
    event(info.reason.split(":")[0])
    assert np.isfinite(new).all()
    assert info.kl <= config.max_kl
    assert info.accepted == (info.surrogate > info.surrogate_old)
    assert info.accepted or new.tobytes() == theta.tobytes()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.tuples(), st.binary(max_size=3),
    st.tuples(st.integers(-2, 100)), st.sampled_from(["float32", "vine", np.float32(0.5), np.int64(3), (64, 64)]),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(tm.Config._fields), VALUES))
def test_fuzz_a_config_is_taken_or_refused_by_the_name_of_a_setting(changes):
    try:
        tm.check_config(tm.Config(**changes))
    except ValueError as error:
        assert str(error).split()[0] in changes
        event("refused")


OPTIONS = sorted(tm._parser()._option_string_actions)
WORDS = st.one_of(st.sampled_from(OPTIONS), st.text(max_size=6), st.integers().map(str), st.floats().map(str))


@given(st.lists(WORDS, max_size=6))
def test_fuzz_the_command_line_is_understood_or_refused_in_one_line(argv):
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            mode, given = tm._parse(argv)
            assert mode in given
            event("understood")
        except SystemExit as stop:
            assert (stop.code, len(errors.getvalue().splitlines())) in ((2, 1), (0, 0))
            event(f"exit code {stop.code}")
