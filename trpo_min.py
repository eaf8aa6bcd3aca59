# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "numba>=0.60", "scipy>=1.11", "gymnasium>=1.1"]
# ///
"""Trust Region Policy Optimization in one file: NumPy, Numba and Gymnasium, no deep-learning framework.

    python trpo_min.py --env CartPole-v1          train; see --help for everything else
    theta, info = trpo_update(policy, theta, batch, config)          one update on a batch of your own

Each update maximises the surrogate L inside a trust region of the mean KL divergence D (Schulman et al. 2015,
"Trust Region Policy Optimization", arXiv:1502.05477).  The labels below are cited where each is computed.

    E1  L(theta) = mean_n w_n exp(log pi_theta(a_n|s_n) - log pi_old(a_n|s_n)) A_n
    E2  D(old, theta) = mean_n KL(pi_old(.|s_n) || pi_theta(.|s_n))
    E3  g = grad L at old = mean_n J_n^T score_n w_n A_n           J_n = d mu_theta(s_n) / d theta
    E4  F v = mean_n J_n^T M_n J_n v                               M_n = Hessian of KL in mu, in closed form
    E5  (F + c I) step_dir = g                                     by preconditioned conjugate gradients
    E6  step_length = sqrt(2 max_kl / step_dir^T F step_dir)
    E7  accept the first backtrack j with D <= max_kl and L > L(old)
    E8  generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438)
    E9  the value function: least squares on the lambda-returns, by the same F v and conjugate gradients
    E10 vine sampling: K actions in each of some states, A by short branch rollouts; w_n exp(...) self-normalised
    E11 eta(new) - eta(old) >= (L(new) - L(old) - 4 eps gamma max_s KL / (1 - gamma)) / (1 - gamma), eps = max |A|

Dimensions: N rows (state-action pairs), D observation features, K head outputs, A action components,
P parameters of the policy, Q of the value function, T time steps, E environments, L layers of weights; in vine
sampling S states of each environment, K actions in each, and branches of H steps.
"""

import argparse
import collections
import contextlib
import copy
import csv
import ctypes
import datetime
import difflib
import functools
import gc
import hashlib
import io
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import typing
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, NamedTuple

import numba
import numpy as np
import scipy.linalg

__version__ = "0.1.0"


def jit(function, **options):
    """Compiled; cached on disk, or compiled anew by each process where Numba finds no folder it may write to."""
    # "numpy": a division by zero gives inf or NaN, which the callers look for, and does not block vectorization.
    # No wrapper for callers in C, of which there are none: the first run is 0.5 s shorter.
    options |= {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    # Numba's cache imports the module that compiled, by the name it had then: as a script, or in a package, it has
    # another.  So each name has its own files, called after __qualname__, and a module that is not registered none.
    function.__qualname__ = f"{__name__}.{function.__name__}"
    importable = __name__ == "__main__" or bool(globals().get("__spec__") and __name__ in sys.modules)
    try:
        return numba.njit(cache=importable, **options)(function)
    except RuntimeError:
        return numba.njit(**options)(function)


# for what one kernel calls, compiled as a part of it: the first run is a second shorter
jit_within = functools.partial(jit, inline="always")


@functools.cache
def _threads():
    """A pool of one thread less than NUMBA_NUM_THREADS says, or cores, as the caller works too; at least one."""
    return ThreadPoolExecutor(max(1, numba.config.NUMBA_NUM_THREADS - 1))


def _fulfil(future, function, *args):
    """future <- what function(*args) returns or raises, unless future was cancelled."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)


def _begin(function, *args):
    """A Future of function(*args), run by one of _threads; by the caller where no thread can be had, as at the end of
    the process."""
    future = Future()
    try:
        _threads().submit(_fulfil, future, function, *args)
    except RuntimeError:
        if future.cancel():  # it may be queued even so: whoever is first does it, and nobody else
            future = Future()
            _fulfil(future, function, *args)
    return future


def _in_parallel(kernel, n, *args):
    """kernel(*args, first, last) for all of range(n), cut into a piece for each thread.

    Python's threads, as the kernels release its lock: 20 us a call slower than Numba's parallel=True, whose code takes
    5 s longer to compile and hangs after a fork.
    """
    if getattr(threading.current_thread(), "unwanted", False):
        raise RuntimeError("what this thread computes is not wanted any more")
    pieces = max(1, min(n, numba.config.NUMBA_NUM_THREADS // max(1, len(_blas_before))))
    # the larger pieces first: the calling thread is at work 70 us before the others, a tenth of F v on 2,048 rows
    edges = [-(-n * k // pieces) for k in range(pieces + 1)]
    others = [_begin(kernel, *args, *edges[k : k + 2]) for k in range(1, pieces)]
    kernel(*args, *edges[:2])
    for other in others:
        other.result()


def _both(first, second):
    """The results of two functions that do not need each other, side by side where there are threads for it.

    1,024 rows are too few to fill two threads: with one each, the two train CartPole-v1 in a tenth less time than with
    two each in turn.  An error or an interrupt in first ends second at its next kernel.
    """
    if _ranks is not None or numba.config.NUMBA_NUM_THREADS == 1:  # ranks have to meet in the same order
        return first(), second()
    future = Future()
    thread = threading.Thread(target=_fulfil, args=(future, second))  # one of _threads would wait for others of them
    try:
        with contextlib.suppress(RuntimeError):  # where no thread can be started, as in _begin
            thread.start()
        return first(), future.result() if thread.ident else second()
    except BaseException:
        thread.unwanted = True
        if not future.cancel():  # it runs, or has run
            wait([future])
        raise


@functools.cache
def _openblas():
    """Get and set the threads of SciPy's OpenBLAS, which compiled products run on; no-ops where it has another BLAS."""
    root = Path(scipy.__file__).parent
    for path in (*root.parent.glob("scipy.libs/*openblas*"), *root.glob(".dylibs/*openblas*")):
        library = ctypes.CDLL(str(path))
        for prefix in ("scipy_openblas", "openblas"):
            if hasattr(library, f"{prefix}_set_num_threads"):
                return getattr(library, f"{prefix}_get_num_threads"), getattr(library, f"{prefix}_set_num_threads")
    return (lambda: 1), (lambda _: None)


# the threads of BLAS before each of the calls in progress; so many calls share the threads of _in_parallel
_blas_lock, _blas_before = threading.Lock(), []


@contextlib.contextmanager
def _one_blas_thread():
    """For the length of a call: products split over threads of their own would round differently, and be in our way.

    The setting is the process's: the last of the calls that overlap puts back what the first one found.
    """
    get_threads, set_threads = _openblas()
    with _blas_lock:
        _blas_before.append(get_threads())
        set_threads(1)
    try:
        yield
    finally:
        with _blas_lock:
            before = _blas_before.pop()
            if not _blas_before:
                set_threads(before)


def _after_fork():
    """In the child there are no other threads, and none of the calls that they were in."""
    global _blas_lock
    _threads.cache_clear()
    _blas_lock = threading.Lock()
    if _blas_before:
        _openblas()[1](_blas_before[0])
        _blas_before.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# ========================================================================== several processes: means over ranks (MPI)
_ranks = None  # the mpi4py communicator of the processes that learn together; None: this one alone


@contextlib.contextmanager
def data_parallel(comm):
    """In the block, trpo_update, fit_value, train and what they call are collective over the ranks of comm (mpi4py).

    Each rank brings rows of its own, one or more, and the same seed, parameters and config.  Every mean over rows is
    then one over the rows of all ranks, so that all come to the same bits.  Without precondition these are, up to
    rounding, those of one process on all rows; with it only nearly, as the factors are of some of each rank's rows, and
    of others in one process.  Where one rank raises, the others would wait for ever: python -m mpi4py script.py ends
    them all.
    """
    global _ranks
    if comm is not None and not hasattr(comm, "Allreduce"):
        raise ValueError(f"comm must be a communicator of mpi4py such as MPI.COMM_WORLD, got {comm}")
    before, _ranks = _ranks, comm
    try:
        yield
    finally:
        _ranks = before


def _sum_over_ranks(x):
    """The sum of every rank's x, an array or anything else that adds, as lists do; x itself in one process."""
    if _ranks is None:
        return x
    if not isinstance(x, np.ndarray):
        return _ranks.allreduce(x)
    total = np.empty(x.shape)
    _ranks.Allreduce(x.astype(np.float64), total)
    return total


def _mean_over_ranks(mean, n_rows):
    """The mean over all rows, out of every rank's mean over its n_rows; in one process that mean itself."""
    if _ranks is None:
        return mean
    mean = np.asarray(mean)
    total = _sum_over_ranks(np.append(n_rows * mean.astype(np.float64), n_rows))  # one message: the count goes along
    return (total[:-1] / total[-1]).reshape(mean.shape).astype(mean.dtype)[()]


def _largest_over_ranks(x):
    return x if _ranks is None else _ranks.allreduce(x, max)


def _digest(arrays):
    return hashlib.sha256(b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def _check_ranks_agree(what, arrays):
    """RuntimeError unless all ranks have the same bits in arrays, a function that returns them by name."""
    if _ranks is not None and len(set(_ranks.allgather(_digest(arrays())))) > 1:
        raise RuntimeError(f"the ranks differ in {what}: each must run the same code with the same seed and config")


# ================================================================================================ what is passed around
class Config(NamedTuple):
    """All settings; each is also a command-line option.  Annotated with type, allowed interval, meaning and unit."""

    hidden: Annotated[tuple[int, ...], "[1, inf)", "widths of the hidden layers of both networks, units"] = (64, 64)
    dtype: Annotated[str, "float64 float32", "type of parameters and batches; of F v, see cg_tol"] = "float64"
    init_std: Annotated[
        float, "(0, inf)", "first sigma of A actions is min(1, init_std / A), in halves of the action's range"
    ] = 2.4
    total_steps: Annotated[int, "[1, inf)", "environment steps to train for"] = 1_000_000
    stop_when_solved: Annotated[bool, "", "stop at the environment's reward threshold (mean of 100 episodes)"] = True
    num_envs: Annotated[
        int, "[0, inf)", "environments stepped together in each rank; 0: 4, or 16 over all ranks where they step as one"
    ] = 0
    vector: Annotated[
        str, "own sync async", "own: as one if Gymnasium can (no env-args); else sync: one by one; async: in processes"
    ] = "own"
    rollout_steps: Annotated[int, "[1, inf)", "environment steps per update, over all environments and ranks"] = 1024
    normalize_obs: Annotated[bool, "", "shift and scale observations by running mean and deviation (1e-4 at least)"] = (
        True
    )
    normalize_reward: Annotated[bool, "", "scale rewards by the running deviation of the discounted return"] = True
    gamma: Annotated[float, "[0, 1]", "discount per step"] = 0.995
    lam: Annotated[float, "[0, 1]", "lambda of the advantage estimator: 0 TD error, 1 Monte Carlo"] = 0.95
    sampling: Annotated[str, "single_path vine", "what advantages come from: the steps taken, or branches off them"] = (
        "single_path"
    )
    vine_states: Annotated[
        int, "[1, inf)", "vine: states per update to branch from, in equal parts of each environment"
    ] = 16
    vine_actions: Annotated[int, "[2, inf)", "vine: branches per state: every action if no more, else samples"] = 4
    vine_steps: Annotated[int, "[1, inf)", "vine: environment steps of a branch, then the value function"] = 16
    max_kl: Annotated[float, "(0, inf)", "trust region: largest mean KL of an update, nats"] = 0.03
    kl_schedule: Annotated[str, "linear constant", "max_kl falls to 0 over total_steps, or stays"] = "linear"
    kl_memory: Annotated[
        float, "[0, 1]", "decay of means of adv^2 and variance of returns: max_kl shrinks with both below; 0: never"
    ] = 1.0
    damping: Annotated[
        float, "[0, inf)", "c in (F + c I), of a Gaussian over mean 1 / 3 sigma^2; with precondition 1e-3 or more"
    ] = 0.1
    cg_iters: Annotated[int, "[1, inf)", "most conjugate gradient iterations per step"] = 4
    cg_tol: Annotated[
        float, "[0, 1)", "stop a solve at this residual over the right-hand side; at 1e-3 or more F v is in float32"
    ] = 0.01
    precondition: Annotated[
        bool, "", "precondition solves by Kronecker factors of F: with damping 1e-3 or more; else set cg_iters to 10"
    ] = True
    backtrack_coef: Annotated[float, "(0, 1)", "factor on the step per backtrack"] = 0.8
    max_backtracks: Annotated[int, "[1, inf)", "candidates the line search tries"] = 15
    value_rollouts: Annotated[
        int, "[1, inf)", "the value function is fitted to every n-th row of the newest n rollouts"
    ] = 4
    value_iters: Annotated[
        int, "[0, inf)", "Gauss-Newton steps of the value function per update; 0: only its mean error"
    ] = 1
    value_damping: Annotated[
        float, "[0, inf)", "damping of a value step, times the variance of the returns; 1e-3 or more too"
    ] = 0.03


_FIELDS = typing.get_type_hints(Config, include_extras=True)


class Policy(NamedTuple):
    """Static, hashable description of a network and its head.

    sizes: widths (D, hidden ..., outputs).  head: "gaussian" (mean from the network, log_std a free vector),
    "categorical" (a product of categoricals with nvec[i] choices each) or "value" (one number, unit metric).
    The rest, which make_policy fills in, says how an environment wants its actions: shape (None: (A,)), type, first
    choices, bounds.
    """

    sizes: tuple[int, ...]
    head: str
    nvec: tuple[int, ...] = ()
    action_shape: tuple[int, ...] | None = None
    action_dtype: str = "float64"
    start: tuple[int, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


class Batch(NamedTuple):
    """State-action pairs sampled by the policy that is to be updated."""

    obs: np.ndarray  # (N, D) as the network sees them
    actions: np.ndarray  # (N, A) as sampled: floats, or choices counted from 0
    adv: np.ndarray  # (N,) advantages, centred by the caller if wanted
    mu_old: np.ndarray  # (N, K) head outputs of the policy that sampled
    weights: np.ndarray | float = 1.0  # (N,) or one number: w_n of E1
    group: int = 1  # K: each K rows in turn are actions of one state, whose weighted ratios are self-normalised, E10


class UpdateInfo(NamedTuple):
    """What an update did.  L, D, their like and entropy are of the parameters that were kept."""

    accepted: bool
    reason: str  # "accepted", or why theta was kept
    surrogate: float  # L(theta), E1
    surrogate_old: float  # L(old)
    kl: float  # D(old, theta), nats, E2
    kl_largest: float  # largest KL over the states of the batch, nats
    adv_largest: float  # largest |A_n|
    entropy: float  # mean entropy, nats
    grad_norm: float  # |g|, E3
    curvature: float  # step_dir^T F step_dir, E6, for weights times advantages of at most 1
    step_length: float  # the factor on that step_dir that was kept
    backtracks: int  # candidates refused before the one kept
    cg_iters: int
    cg_residual: float  # |g - (F + c I) step_dir| in the units of g, as far as cg knows it
    cg_status: str


class CGResult(NamedTuple):
    """Solution, its residual norm, iterations taken, and how it ended: see cg."""

    x: np.ndarray
    residual_norm: float
    n_iter: int
    status: str  # CONVERGED, ITERATION_LIMIT, NEGATIVE_CURVATURE or NOT_FINITE


def _n_weights(policy):
    return sum((m + 1) * n for m, n in zip(policy.sizes, policy.sizes[1:], strict=False))


def n_params(policy):
    """P: the length of theta."""
    return _n_weights(policy) + (policy.sizes[-1] if policy.head == "gaussian" else 0)


def n_outputs(policy):
    """K: the columns of mu."""
    return policy.sizes[-1] * (2 if policy.head == "gaussian" else 1)


# =============================================================================================== checks at the boundary
def _finite(name, array, shape, dtype=None):
    """array in C order, of this shape (None: any length) and dtype, or a ValueError that says what is wrong with it."""
    try:
        array = np.asarray(array)
    except ValueError:  # lists of unequal length
        array = np.asarray(None)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be an array of real numbers, got {array.dtype}")
    dtype = np.dtype(dtype or (array.dtype if array.dtype.kind == "f" else np.float64))
    if dtype not in (np.float64, np.float32):
        raise ValueError(f"{name} must be float64 or float32, got {dtype}")
    if array.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, array.shape, strict=True)):
        expected = str(shape).replace("None", "any")
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}")
    if array.size == 0 and 0 not in shape:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    with np.errstate(over="ignore"):
        array = np.require(array, dtype, ["C", "A", "W"])
    if not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0]
        raise ValueError(f"{name} must be finite in {dtype}, got NaN or infinity at index {index}")
    return array


def _check_policy(policy):
    if not isinstance(policy, Policy):
        raise ValueError(f"policy must be a Policy, got {type(policy).__name__}")
    sizes = policy.sizes
    if not (isinstance(sizes, tuple) and isinstance(policy.nvec, tuple)):
        raise ValueError(f"sizes and nvec must be tuples, got {policy}")
    if policy.head not in ("gaussian", "categorical", "value"):
        raise ValueError(f"head must be gaussian, categorical or value, got {policy.head!r}")
    if not all(type(n) in (int, np.int32, np.int64) and n > 0 for n in (*sizes, *policy.nvec)):
        raise ValueError(f"sizes and nvec must be positive integers (int, np.int32 or np.int64), got {policy}")
    if len(sizes) < 2:
        raise ValueError(f"sizes must be two or more widths (D, hidden ..., outputs), got {sizes}")
    if sum(policy.nvec) != (sizes[-1] if policy.head == "categorical" else 0):
        raise ValueError(f"nvec must add up to the outputs of a categorical head, got {policy}")


def _check_theta(policy, theta, name="theta"):
    _check_policy(policy)
    return _finite(name, theta, (n_params(policy),))


def _check_inputs(policy, theta, obs, name="theta"):
    theta = _check_theta(policy, theta, name)
    return theta, _finite("obs", obs, (None, policy.sizes[0]), theta.dtype)


def _group_mean(rows, group):
    """The mean of each group of so many rows in turn, once for each of its rows."""
    return np.repeat(rows.reshape(-1, group).mean(axis=1), group)


def _check_batch(policy, theta, batch):
    """theta and batch as contiguous arrays of theta's dtype, or a ValueError that names the field."""
    if not isinstance(batch, Batch):
        raise ValueError(f"batch must be a Batch, got {type(batch).__name__}")
    theta, obs = _check_inputs(policy, theta, batch.obs)
    _check_stochastic(policy)
    n, dtype = len(obs), theta.dtype
    actions = _check_actions(policy, batch.actions, n, dtype)
    adv = _finite("adv", batch.adv, (n,), dtype)
    mu_old = _finite("mu_old", batch.mu_old, (n, n_outputs(policy)), dtype)
    weights = _finite("weights", batch.weights, (n,) if np.ndim(batch.weights) else (), dtype)
    _check_number("group", batch.group, int, "[1, inf)")
    if n % batch.group:
        raise ValueError(f"group must divide the number of rows, {n}, got {batch.group}")
    if batch.group > 1:
        weights = _check_groups(obs, np.broadcast_to(weights, n).reshape(-1, batch.group))
    return theta, Batch(obs, actions, adv, mu_old, weights, int(batch.group))


def _check_stochastic(policy):
    if policy.head == "value":
        raise ValueError("policy must have a gaussian or categorical head, got a value function")


def _check_actions(policy, actions, n, dtype):
    if policy.head == "gaussian":
        return _finite("actions", actions, (n, policy.sizes[-1]), dtype)
    actions, shape = np.ascontiguousarray(actions), (n, len(policy.nvec))
    if actions.shape != shape or actions.dtype.kind not in "iu":
        raise ValueError(f"actions must be integers of shape {shape}, got {actions.dtype} of shape {actions.shape}")
    wrong = (actions < 0) | (actions >= policy.nvec)
    if wrong.any():
        raise ValueError(f"actions must be choices from 0 to below nvec={policy.nvec}, got {actions[wrong][0]}")
    return actions.astype(np.int64)


def _check_groups(obs, weights):
    """weights (N,) out of weights (states, K), divided by their mean in each state: no scale of them matters."""
    K, largest = weights.shape[1], weights.max(axis=1, keepdims=True)
    if (weights < 0).any() or not largest.all():
        raise ValueError("weights must not be negative, and not all be 0, in a group")
    if (obs != np.repeat(obs[::K], K, axis=0)).any():
        raise ValueError(f"each group of {K} rows must be of one state, got rows of obs that differ")
    weights = weights / largest
    return (weights / weights.mean(axis=1, keepdims=True)).ravel()


def _check_mu_old(mu_old, mu):
    """The trust region is around mu_old: a stale one, or obs normalised anew since, would move it off theta."""
    far, tolerance = np.abs(mu_old - mu).max(), np.sqrt(np.finfo(mu.dtype).eps) * max(1.0, np.abs(mu).max())
    if not far <= tolerance:
        raise ValueError(f"mu_old must be forward(policy, theta, obs), the policy that sampled; it is {far:.3g} away")


def check_config(config):
    """Raises ValueError where a field of config has the wrong type or is out of its interval."""
    if not isinstance(config, Config):
        raise ValueError(f"config must be a Config, got {config!r}")
    for name, hint in _FIELDS.items():
        kind, (interval, _) = hint.__origin__, hint.__metadata__
        value, several = getattr(config, name), kind == tuple[int, ...]
        if several and not isinstance(value, tuple):
            raise ValueError(f"{name} must be a tuple of integers, got {value!r}")
        for number in value if several else (value,):
            _check_number(name, number, int if several else kind, interval)


def _check_number(name, number, kind, interval):
    if kind is str:
        ok, expected = isinstance(number, str) and number in interval.split(), " or ".join(interval.split())
    elif kind is bool:
        ok, expected = isinstance(number, (bool, np.bool_)), "True or False"
    else:
        low, high = (float(end) for end in interval[1:-1].split(","))
        numbers = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
        ok = isinstance(number, numbers) and not isinstance(number, bool)
        ok = ok and (number > low or (number == low and interval[0] == "["))
        ok = ok and (number < high or (number == high and interval[-1] == "]"))
        expected = f"{'an integer' if kind is int else 'a number'} in {interval}"
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {number!r}")


# ========================================================================================================= policy heads
# mu (N, K) is the mean and log_std (N, 2A) of a Gaussian, or the logits (N, sum(nvec)) of a product of categoricals:
# one softmax for each group of nvec[i] columns.  log_std is a free vector, repeated on every row.
LOG_2PI = float(np.log(2 * np.pi))


def _columns(x):
    """x (N, K) as (K, N): NumPy's loops over N are 3 to 40 times as fast as over a few columns, and a third as fast as
    over a thousand."""
    return np.ascontiguousarray(x.T)


def _parts(policy, mu):
    """mean and log_std (A, N) of a Gaussian, the logits (n, N) of each categorical; they may be NaN or infinite."""
    _check_stochastic(policy)
    if np.shape(mu) != (*np.shape(mu)[:1], n_outputs(policy)):
        raise ValueError(f"mu must have shape (any, {n_outputs(policy)}), got {np.shape(mu)}")
    edges = [policy.sizes[-1]] if policy.head == "gaussian" else np.cumsum(policy.nvec)[:-1]
    return np.split(_columns(np.asarray(mu)), edges)


def _log_softmax(logits):
    shifted = logits - logits.max(axis=0)
    return shifted - np.log(np.exp(shifted).sum(axis=0))


def log_prob(policy, mu, actions):
    """log pi(a|s) (N,) in nats, of actions (N, A) under mu (N, K).

    Gaussian: -sum_i z_i^2 / 2 + log_std_i + log(2 pi) / 2, z = (a - mean) / sigma; categorical: sum of log p[a_i].
    """
    parts = _parts(policy, mu)
    actions = _check_actions(policy, actions, len(mu), np.result_type(parts[0], np.float32))
    if policy.head == "gaussian":
        mean, log_std = parts
        z = (_columns(actions) - mean) * np.exp(-log_std)
        return -(0.5 * z * z + log_std + 0.5 * LOG_2PI).sum(axis=0)
    rows = np.arange(len(mu))
    return sum(_log_softmax(logits)[chosen, rows] for logits, chosen in zip(parts, _columns(actions), strict=True))


def entropy(policy, mu):
    """-E log pi(a|s) (N,) in nats.  Gaussian: sum of log_std + log(2 pi e) / 2; categorical: -sum p log p."""
    parts = _parts(policy, mu)
    if policy.head == "gaussian":
        return (parts[1] + 0.5 * (1 + LOG_2PI)).sum(axis=0)
    log_p = [_log_softmax(logits) for logits in parts]
    return -sum((np.exp(lp) * lp).sum(axis=0) for lp in log_p)


def kl(policy, mu_old, mu_new):
    """KL(pi_old(.|s) || pi_new(.|s)) (N,) in nats, the integrand of E2.

    With f(t) = exp(t) - 1 - t >= 0, so that it is 0 at old, never negative, and precise as it goes to 0: categorical
    sum of p_old f(log p_new/p_old); Gaussian sum of ((shift / sigma_new)^2 + f(2 log sigma_old/sigma_new)) / 2.
    """
    old, new = _parts(policy, mu_old), _parts(policy, mu_new)
    if np.shape(mu_old) != np.shape(mu_new):
        raise ValueError(f"mu_old and mu_new must have the same shape, got {np.shape(mu_old)} and {np.shape(mu_new)}")
    if policy.head == "gaussian":
        (mean_old, log_std_old), (mean_new, log_std_new) = old, new
        t = 2 * (log_std_old - log_std_new)
        shift = (mean_old - mean_new) * np.exp(-log_std_new)
        return 0.5 * (shift * shift + (np.expm1(t) - t)).sum(axis=0)
    total = 0.0
    for logits_old, logits_new in zip(old, new, strict=True):
        log_p, log_q = _log_softmax(logits_old), _log_softmax(logits_new)
        p, t = np.exp(log_p), log_q - log_p
        small = np.minimum(t, 1)  # beyond, p exp(t) = q, which cannot overflow
        total = total + np.where(t < 1, p * (np.expm1(small) - small), np.exp(log_q) - p * (1 + t)).sum(axis=0)
    return total


def score(policy, mu, actions):
    """d log pi(a|s) / d mu (N, K).  Gaussian: z / sigma and z^2 - 1; categorical: one-hot(a) - p."""
    parts = _parts(policy, mu)
    actions = _check_actions(policy, actions, len(mu), np.result_type(parts[0], np.float32))
    if policy.head == "gaussian":
        mean, log_std = parts
        z = (_columns(actions) - mean) * np.exp(-log_std)
        return _columns(np.concatenate([z * np.exp(-log_std), z * z - 1]))
    hot, starts = np.zeros(np.shape(mu), parts[0].dtype), np.cumsum(policy.nvec) - policy.nvec
    hot[np.arange(len(mu))[:, None], starts + actions] = 1
    return hot - _metric_diagonal(policy, mu)


def _metric_diagonal(policy, mu):
    """What M is made of (N, K).  Gaussian: M = diag(1/sigma^2, 2); categorical: p, M = diag(p) - p p^T; value: 1."""
    if policy.head == "gaussian":
        log_std = _parts(policy, mu)[1]
        return _columns(np.concatenate([np.exp(-2 * log_std), np.full_like(log_std, 2)]))
    if policy.head == "categorical":
        return _columns(np.concatenate([np.exp(_log_softmax(logits)) for logits in _parts(policy, mu)]))
    return np.ones_like(mu)


@jit
def _metric_block(m, nvec, du, i, j):
    """du <- M du for rows i to j: m du, where each of the nvec categoricals first subtracts its mean p . du.

    M times a constant is 0, so du at the likeliest choice can go first: nothing cancels as its p goes to 1.
    """
    for row in range(j - i):
        first = 0
        for n in nvec:
            likeliest = first
            for k in range(first, first + n):
                if m[i + row, k] > m[i + row, likeliest]:
                    likeliest = k
            reference, mean = du[row, likeliest], du.dtype.type(0)
            for k in range(first, first + n):
                du[row, k] -= reference
                mean += m[i + row, k] * du[row, k]
            for k in range(first, first + n):
                du[row, k] -= mean
            first += n
        for k in range(du.shape[1]):
            du[row, k] *= m[i + row, k]


def fisher_metric(policy, mu, dmu):
    """M dmu (N, K), M = Hessian of KL(pi_mu || pi_mu') in mu' at mu: the Fisher information of the head, E4.

    Gaussian: dmean / sigma^2 and 2 dlog_std; categorical: p dmu - p (p . dmu); value: dmu.  dmu . M dmu >= 0.
    """
    mu = _finite("mu", mu, (None, n_outputs(policy)))
    du = _finite("dmu", dmu, mu.shape, mu.dtype).copy()
    _metric_block(_metric_diagonal(policy, mu), np.array(policy.nvec, np.int64), du, 0, len(du))
    return du


@jit
def _sample_rows(mu, nvec, noise, actions):
    """actions <- samples of mu, made of noise (N, A): normal draws for a Gaussian, uniform in [0, 1) for categoricals.

    The choice is the first whose cumulative weight exceeds the draw times the total.  There always is one: the weights
    are added up twice in the same order, and in float64 a draw below 1 times the total is below the total.
    """
    for i in range(mu.shape[0]):
        if nvec.size == 0:
            for k in range(noise.shape[1]):
                actions[i, k] = mu[i, k] + np.exp(mu[i, noise.shape[1] + k]) * noise[i, k]
        first = 0
        for group, n in enumerate(nvec):
            largest = mu[i, first]
            for k in range(first, first + n):
                largest = max(largest, mu[i, k])
            total = 0.0
            for k in range(first, first + n):
                total += np.exp(mu[i, k] - largest)
            cumulative = 0.0
            for k in range(n):
                cumulative += np.exp(mu[i, first + k] - largest)
                if cumulative > noise[i, group] * total:
                    actions[i, group] = k
                    break
            first += n


def _draw(policy, rng, shape, dtype):
    """Noise and room for samples (*shape, A).  float64 noise, as a float32 below 1 could round to 1."""
    if policy.head == "gaussian":
        shape = (*shape, policy.sizes[-1])
        return rng.standard_normal(shape), np.empty(shape, dtype)
    shape = (*shape, len(policy.nvec))
    return rng.random(shape), np.zeros(shape, np.int64)


def sample(policy, mu, rng):
    """Actions (N, A) drawn from pi_mu: floats (not clipped), or choices counted from 0."""
    _check_stochastic(policy)
    mu = _finite("mu", mu, (None, n_outputs(policy)))
    noise, actions = _draw(policy, rng, mu.shape[:1], mu.dtype)
    _sample_rows(mu, np.array(policy.nvec, np.int64), noise, actions)
    return actions


# ==================================================================================== network: forward, J v, J^T u, F v
# theta holds W (m, n) and b (n,) of each layer in turn, then log_std (A,) for a Gaussian head.  acts holds obs, the
# tanh outputs of each hidden layer and the network's outputs, layer after layer, rows in order: N * sum(sizes) numbers.
# jac, where it is not empty (or None), holds G (N, K, n) of each hidden layer but the last, layer after layer: the
# derivative of the network's K outputs by what goes into the layer's tanh.
BLOCK = 192  # rows per block: few enough to stay in the caches, many enough for products near their full speed


@jit
def _layer(theta, sizes, layer):
    """W (m, n) and b (n,) of a layer, as views into theta (or into any vector laid out like it)."""
    start = 0
    for k in range(layer):
        start += (sizes[k] + 1) * sizes[k + 1]
    m, n = sizes[layer], sizes[layer + 1]
    return theta[start : start + m * n].reshape(m, n), theta[start + m * n : start + m * n + n]


@jit
def _rows(acts, sizes, layer, i, j):
    """Rows i to j of a layer's activations (j - i, sizes[layer]), as a view into acts."""
    n, n_rows = sizes[layer], acts.size // sizes.sum()
    start = n_rows * sizes[:layer].sum()
    return acts[start + i * n : start + j * n].reshape(j - i, n)


@jit
def _jac_rows(jac, sizes, layer, i, j):
    """G of rows i to j and a hidden layer ((j - i) K, sizes[layer]), as a view into jac."""
    n, K = sizes[layer], sizes[-1]
    start = jac.size // sizes[1:-2].sum() * sizes[1:layer].sum()
    return jac[start + i * K * n : start + j * K * n].reshape((j - i) * K, n)


@jit
def _copy(source, out):
    """The first columns of out <- source; a slice assignment takes seconds longer to compile."""
    for i in range(source.shape[0]):
        for k in range(source.shape[1]):
            out[i, k] = source[i, k]


@jit
def _add_times(out, a, x):
    """out += a x"""
    a = out.dtype.type(a)
    for k in range(out.size):
        out[k] += a * x[k]


@jit_within
def _add_bias(z, b):
    for i in range(z.shape[0]):
        for k in range(z.shape[1]):
            z[i, k] += b[k]


@jit_within
def _tanh_inplace(z):
    """tanh(x) for every entry: Lambert's fraction at y = x/16, then tanh 2y = 2 tanh y / (1 + tanh^2 y) four times.

    tanh y ~ num/den = y (945 + 105 y^2 + y^4) / (945 + 420 y^2 + 15 y^4); doubling num and den apart needs one
    division.  Relative error below 6 eps, or 8 near the least normal number.  Never beyond 1, where the slope 1 - h^2
    would be negative, and exactly 1 from 20 on, where huge observations multiply it.  It vectorizes: 6 times libm's
    speed.
    """
    cast = z.dtype.type
    limit, scale, one, two = cast(20), cast(1 / 16), cast(1), cast(2)
    a1, a2, b1, b2 = cast(1 / 9), cast(1 / 945), cast(4 / 9), cast(1 / 63)
    flat = z.reshape(z.size)  # a loop over rows of 64 numbers takes 1.6 times as long
    for k in range(flat.size):
        x = flat[k]
        y = x * scale
        y2 = y * y
        num = y * (one + y2 * (a1 + y2 * a2))
        den = one + y2 * (b1 + y2 * b2)
        for _ in range(4):
            num, den = two * num * den, den * den + num * num
        h = min(max(num / den, -one), one)
        flat[k] = one if x >= limit else -one if x <= -limit else h


@jit
def _forward_block(theta, sizes, acts, i, j):
    """Layers 1 to L of acts for rows i to j: h <- tanh(h W + b), the last one without tanh."""
    last = sizes.size - 2
    for layer in range(last + 1):
        W, b = _layer(theta, sizes, layer)
        z = _rows(acts, sizes, layer + 1, i, j)
        np.dot(_rows(acts, sizes, layer, i, j), W, z)
        _add_bias(z, b)
        if layer < last:
            _tanh_inplace(z)


@jit_within
def _jvp_block(theta, v, sizes, acts, jac, dacts, carried, i, j):
    """Forward mode: dacts <- d acts along v.  dh' = (h dW + dh W + db) (1 - h'^2), the last layer without the slope.

    With jac only the last two layers are done so, and each before them moves the outputs by G (h dW + db).  carried is
    room for dh W, laid out like dacts; the caller sets it to 0, as which the first layer done so reads it.
    """
    last = sizes.size - 2
    first = last - 1 if jac.size > 0 else 0
    for layer in range(first, last + 1):
        W, _ = _layer(theta, sizes, layer)
        dW, db = _layer(v, sizes, layer)
        dz, dhW = _rows(dacts, sizes, layer + 1, 0, j - i), _rows(carried, sizes, layer + 1, 0, j - i)
        np.dot(_rows(acts, sizes, layer, i, j), dW, dz)
        if layer > first:
            np.dot(_rows(dacts, sizes, layer, 0, j - i), W, dhW)
        _sum_times_slope(dz, dhW, db, _rows(acts, sizes, layer + 1, i, j), layer < last)
    for layer in range(first):
        dW, db = _layer(v, sizes, layer)
        dz = _rows(dacts, sizes, layer + 1, 0, j - i)
        np.dot(_rows(acts, sizes, layer, i, j), dW, dz)
        _add_jac_times(_jac_rows(jac, sizes, layer + 1, i, j), dz, db, _rows(dacts, sizes, last + 1, 0, j - i))


@functools.partial(jit, fastmath={"reassoc"})  # may add up in the order that vectorizes
def _add_jac_times(G, dz, db, du):
    """du += G (dz + db), row by row."""
    K = du.shape[1]
    for row in range(du.shape[0]):
        for k in range(K):
            total = du[row, k]
            for n in range(dz.shape[1]):
                total += G[row * K + k, n] * (dz[row, n] + db[n])
            du[row, k] = total


@jit_within
def _sum_times_slope(dz, dhW, db, h, curved):
    """dz <- (dz + dhW + db) (1 - h^2 if curved): in one pass, F v is 6% faster than in three."""
    one = h.dtype.type(1)
    for i in range(dz.shape[0]):
        for k in range(dz.shape[1]):
            total = dz[i, k] + dhW[i, k] + db[k]
            dz[i, k] = total * (one - h[i, k] * h[i, k]) if curved else total


@jit_within
def _vjp_block(theta, sizes, acts, jac, dacts, i, j, out):
    """Reverse mode: out <- J^T u, with u in the last layer of dacts; the layers before it are overwritten.

    dW = h^T u, db = sum of u, and u <- (u W^T) (1 - h^2) for the layer before, or u <- G^T u where jac has its G.
    """
    last = sizes.size - 2
    for layer in range(last, -1, -1):
        W, _ = _layer(theta, sizes, layer)
        dW, db = _layer(out, sizes, layer)
        h = _rows(acts, sizes, layer, i, j)
        u = _rows(dacts, sizes, layer + 1, 0, j - i)
        np.dot(h.T, u, dW)
        for k in range(db.size):
            db[k] = 0
        for row in range(u.shape[0]):
            for k in range(u.shape[1]):
                db[k] += u[row, k]
        if layer > 0:
            u_before = _rows(dacts, sizes, layer, 0, j - i)
            if jac is not None and jac.size > 0 and layer < last:
                u_top = _rows(dacts, sizes, last + 1, 0, j - i)
                _jac_transposed_times(_jac_rows(jac, sizes, layer, i, j), u_top, u_before)
            else:
                np.dot(u, W.T, u_before)
                _times_tanh_slope(u_before, h)


@jit
def _times_tanh_slope(dz, h):
    """dz <- dz (1 - h^2), with h = tanh(z); dz has one row for each of h, or as many in turn."""
    one, K = h.dtype.type(1), dz.shape[0] // h.shape[0]
    for i in range(h.shape[0]):
        for row in range(i * K, (i + 1) * K):
            for k in range(dz.shape[1]):
                dz[row, k] *= one - h[i, k] * h[i, k]


@jit_within
def _jac_transposed_times(G, u, u_before):
    """u_before <- G^T u, row by row."""
    K = u.shape[1]
    for row in range(u.shape[0]):
        for n in range(u_before.shape[1]):
            u_before[row, n] = G[row * K, n] * u[row, 0]
        for k in range(1, K):
            for n in range(u_before.shape[1]):
                u_before[row, n] += G[row * K + k, n] * u[row, k]


@jit
def _jac_blocks(theta, sizes, acts, jac, first, last):
    """jac, from the last layer on: G = W^T (1 - h^2), and (G W^T) (1 - h^2) for the layer before."""
    top, K, n_rows = sizes.size - 2, sizes[-1], acts.size // sizes.sum()
    for block in range(first, last):
        i, j = block * BLOCK, min((block + 1) * BLOCK, n_rows)
        W, _ = _layer(theta, sizes, top)
        G = np.empty(((j - i) * K, sizes[top]), theta.dtype)
        for row in range(G.shape[0]):
            for n in range(G.shape[1]):
                G[row, n] = W[n, row % K]
        _times_tanh_slope(G, _rows(acts, sizes, top, i, j))
        for layer in range(top - 1, 0, -1):
            W, _ = _layer(theta, sizes, layer)
            G_before = _jac_rows(jac, sizes, layer, i, j)
            np.dot(G, W.T, G_before)
            _times_tanh_slope(G_before, _rows(acts, sizes, layer, i, j))
            G = G_before


@functools.cache
def _keep_freed_memory():
    """Once per process: glibc's malloc gives a freed block back to the system, and the next comes by page faults, until
    it has seen one as large freed before.  So one is, never written to.  Without it, an update on 1,024 rows of
    CartPole-v1 took 670 page faults, a fifth of its time.  With it, the process may keep 62 MB that it does not use.
    """
    np.empty(31 << 20, np.uint8)  # malloc learns from blocks of up to 32 MB


@jit
def _forward_blocks(theta, sizes, acts, first, last):
    n_rows = acts.size // sizes.sum()
    for block in range(first, last):
        _forward_block(theta, sizes, acts, block * BLOCK, min((block + 1) * BLOCK, n_rows))


def _n_blocks(n_rows):
    return -(-n_rows // BLOCK)


def _activations(theta, sizes, obs):
    """acts for obs (N, D); the network's outputs are its last N * sizes[-1] numbers."""
    _keep_freed_memory()
    acts = np.empty(len(obs) * sizes.sum(), obs.dtype)
    acts[: obs.size] = obs.ravel()
    _in_parallel(_forward_blocks, _n_blocks(len(obs)), theta, sizes, acts)
    return acts


@jit
def _jtu_chunks(theta, v, sizes, acts, jac, m, nvec, u, partial, first, last):
    """partial[first to last] += what these equal chunks of the rows add to J^T u, or J^T M J v: the other is None.

    Numba compiles a kernel for each, which leaves out what is for the one that is None, and for jac where that is.
    """
    n_rows, n_chunks = acts.size // sizes.sum(), partial.shape[0]
    n_blocks = (n_rows + BLOCK - 1) // BLOCK
    dacts, carried = np.empty(BLOCK * sizes.sum(), theta.dtype), np.zeros(BLOCK * sizes.sum(), theta.dtype)
    summand = np.zeros(theta.size, theta.dtype)
    for chunk in range(first, last):
        for block in range(chunk * n_blocks // n_chunks, (chunk + 1) * n_blocks // n_chunks):
            i, j = block * BLOCK, min((block + 1) * BLOCK, n_rows)
            du = _rows(dacts, sizes, sizes.size - 1, 0, j - i)
            if u is not None:
                _copy(u[i:j], du)
            if v is not None:
                _jvp_block(theta, v, sizes, acts, jac, dacts, carried, i, j)
                _metric_block(m, nvec, du, i, j)
            _vjp_block(theta, sizes, acts, jac, dacts, i, j, summand)
            _add_times(partial[chunk], 1, summand)


def _jac(theta, sizes, acts, n_fvp):
    """jac for acts; empty where there are less than two hidden layers, or n_fvp times F v would not repay it.

    It takes a product for each output once, and spares every F v two of the four between hidden layers.  With it, four
    F v of one to three outputs take 0.7 to 0.9 times as long, of four 1.0 to 1.1 times; ten F v of four 0.8 to 0.9
    times.  Solves that may take more seldom do.  Where G has more than eight rows for each of acts it leaves the
    caches: three outputs, 32 layers of 64 took 1.5 times as long.
    """
    n_rows, K = acts.size // sizes.sum(), sizes[-1]
    pays = min(n_fvp, 5) > K and K * (sizes.size - 3) <= 8
    jac = np.empty(n_rows * K * sizes[1:-2].sum() if pays else 0, acts.dtype)
    if jac.size > 0:
        _in_parallel(_jac_blocks, _n_blocks(n_rows), theta, sizes, acts, jac)
    return jac


def _jtu(theta, v, sizes, acts, jac, m, nvec, u):
    """J^T u for u (N, outputs), with v and jac None, or J^T M J v, a JVP, M and a VJP per block, with u None.

    Returns the sums over the rows of each of some chunks (chunks, P).  Their number is set by the sizes and not by the
    threads, so that the bits never change, and is small enough for the sums to take no more memory than acts, unless it
    is 1.
    """
    n_chunks = max(1, min(_n_blocks(len(m if u is None else u)), 64, acts.size // theta.size))
    partial = np.zeros((n_chunks, theta.size), theta.dtype)
    _in_parallel(_jtu_chunks, n_chunks, theta, v, sizes, acts, jac, m, nvec, u, partial)
    return partial


# ============================================================================================== E5: conjugate gradients
CONVERGED, ITERATION_LIMIT = "converged", "iteration limit"
NEGATIVE_CURVATURE, NOT_FINITE = "negative curvature", "not finite"


@functools.partial(jit, fastmath={"reassoc"})  # may add up in the order that vectorizes, always the same
def _dot(a, b):
    """a . b, added up in float64: BLAS would add in an order that depends on the number of threads."""
    total = 0.0
    for k in range(a.size):
        total += np.float64(a[k]) * np.float64(b[k])
    return total


def _cg(matvec, b, max_iter, tol, precondition):
    """x, the residual r = b - A x by recurrence, iterations and status of cg.  matvec may be less precise than b."""
    x, r, p, rz, limits = np.zeros_like(b), b.copy(), np.zeros_like(b), np.inf, np.finfo(b.dtype)
    stop = max(tol, float(limits.eps)) ** 2 * _dot(r, r)  # where F is singular, x would grow by rounding alone
    for n_iter in range(max_iter):
        if _dot(r, r) <= stop < np.inf:
            return x, r, n_iter, CONVERGED
        z = precondition(r)
        rz_before, rz = rz, _dot(r, z)
        p = z + b.dtype.type(rz / rz_before) * p
        Ap = matvec(p)
        pAp = _dot(p, Ap)
        alpha = rz / pAp if min(rz, pAp) > 0 else np.nan  # infinite where pAp is near the least number there is
        if not (pAp < np.inf and alpha < float(limits.max)):  # also where it is NaN
            return x, r, n_iter, NEGATIVE_CURVATURE if min(rz, pAp) <= 0 else NOT_FINITE
        _add_times(x, alpha, p)
        _add_times(r, -alpha, Ap)
    return x, r, max_iter, CONVERGED if _dot(r, r) <= stop else ITERATION_LIMIT


@np.errstate(all="ignore")  # status says what went wrong
def cg(matvec, b, max_iter=10, tol=1e-10, *, precondition=None):
    """E5: solve A x = b by conjugate gradients from x = 0, for a symmetric positive definite matvec(p) = A p.

    Stops at a residual |b - A x| <= max(tol, eps) |b|, or after max_iter iterations, or, with x as it was before that
    iteration, at a direction p with p^T A p <= 0 or not finite: see CGResult.status.  b = 0 gives x = 0 in no
    iterations.  The residual is the recurrence's, equal to |b - A x| to about n_iter eps |A| |x|.  b is left as it is.
    precondition(r): about A^-1 r, symmetric and positive definite too; the nearer, the fewer iterations.
    Source: Hestenes and Stiefel 1952.
    """
    b = _finite("b", b, (None,))
    _check_number("max_iter", max_iter, int, "[0, inf)")
    _check_number("tol", tol, float, "[0, inf)")
    scale = np.abs(b).max() or 1.0  # squares of |b| may not overflow or underflow

    def checked(name, function):
        def call(p):
            Ap = np.array(function(p.copy()), b.dtype)
            if Ap.shape != b.shape:
                raise ValueError(f"{name}(p) must have the shape of p, {b.shape}, got {Ap.shape}")
            return Ap

        return call

    products = checked("matvec", matvec), checked("precondition", precondition or (lambda r: r))
    x, r, n_iter, status = _cg(products[0], b / scale, max_iter, tol, products[1])
    return CGResult(x * scale, _dot(r, r) ** 0.5 * float(scale), n_iter, status)


def _kronecker_factors(theta, sizes, acts, m, nvec):
    """A (m + 1, m + 1) and S (n, n) for each layer, of W (m, n), the last first: A (x) S is near its block of F.  Of
    each, the upper half: below the diagonal are zeros.

    A = mean h h^T of its inputs h and a 1 for b; S = mean g g^T, g = G^T B^T e with G (K, n) the derivative of the
    outputs by what goes into its tanh, M = B^T B and e random signs: E[g g^T] = G^T M G at the cost of one output.
    Every fourth row is enough, of fewer than 256, more; and each one place further on than the last, as the rows of
    environments may take turns.  Of more than 513 columns (a layer of 512 and the 1), a factor would cost more than it
    spares: its mean eigenvalue, in a matrix (1, 1), stands for it.  Source: Martens and Grosse 2015, "Optimizing Neural
    Networks with Kronecker-factored Approximate Curvature", arXiv:1503.05671.
    """
    step = max(1, min(4, len(m) // 64))
    rows = np.arange(0, len(m), step)
    rows = np.minimum(rows + rows // step % step, len(m) - 1)
    layers, p = np.split(acts, len(m) * np.cumsum(sizes)[:-1]), m[rows]
    # of SciPy's BLAS, which _one_blas_thread holds to one thread: NumPy has its own
    gemm, syrk = scipy.linalg.get_blas_funcs(("gemm", "syrk"), dtype=acts.dtype)
    g = np.sqrt(p) * np.random.default_rng(0).choice(np.array((-1, 1), acts.dtype), p.shape)
    if nvec.size:  # M = diag(p) - p p^T of each categorical: row k of B is sqrt(p_k) (e_k - p)
        g -= p * np.repeat(np.add.reduceat(g, np.cumsum(nvec) - nvec, axis=1), nvec, axis=1)
    for layer in range(len(sizes) - 2, -1, -1):
        h = np.append(layers[layer].reshape(len(m), -1)[rows], np.ones((len(rows), 1), acts.dtype), axis=1)
        sums = (syrk(1.0, x.T) if x.shape[1] <= 513 else np.array([[(x * x).sum() / x.shape[1]]]) for x in (h, g))
        yield [_mean_over_ranks(x.astype(float) / len(rows), len(rows)) for x in sums]
        if layer > 0:
            W, _ = _layer(theta, sizes, layer)
            g = gemm(1.0, W.T, g.T, trans_a=1).T * (1 - np.square(h[:, :-1]))  # BLAS counts columns first


def _preconditioner(theta, sizes, acts, m, nvec, damping):
    """A function of r: about (F + damping I)^-1 r, by A^-1 R S^-1 for each layer's part R (m + 1, n) of r.

    (A + u I) (x) (S + damping / u I) stands for A (x) S + damping I, with u^2 damping times the mean eigenvalue of A
    over that of S.  Without damping, where F is singular as a rule, a solve goes far along what F does not see, and the
    line search has to come back.
    """
    inverses, symm = [], scipy.linalg.get_blas_funcs("symm", dtype=theta.dtype)
    for A, S in _kronecker_factors(theta, sizes, acts, m, nvec):
        a, s = A.trace() / len(A), max(S.trace() / len(S), 1e-30)
        if not a * s < np.inf:  # the squares overflow
            return lambda r: r
        damped = max(damping, 1e-6 * a * s) ** 0.5  # the rows may say nothing of some directions
        for factor, ratio in ((A, a / s), (S, s / a)):
            factor.flat[:: len(factor) + 1] += damped * ratio**0.5
            factor[:], _ = scipy.linalg.lapack.dpotri(scipy.linalg.lapack.dpotrf(factor)[0])
        inverses.insert(0, (A.astype(theta.dtype), S.astype(theta.dtype)))

    def times(r):
        z, start = r / (2 + damping), 0  # log_std's block of F is 2 I
        for (A, S), m, n in zip(inverses, sizes[:-1] + 1, sizes[1:], strict=True):
            R = r[start : start + m * n].reshape(m, n)
            R = symm(1.0, A, R.T, side=1).T if len(A) == m else A * R  # it reads the upper half
            R = symm(1.0, S, R.T).T if len(S) == n else R * S
            z[start : start + m * n] = R.ravel()
            start += m * n
        return z

    return times


@jit
def _mean_damped(sums, n_rows, v, sizes, damping):
    """F v + damping v out of _jtu's sums.  log_std does not see the state, so its block of F is 2 I whatever the rows.

    As one compiled call, and not nine of NumPy, it makes an update on 512 rows take 10% less time, on 2,048 3%.
    """
    out, n_weights, n_rows, damping = np.zeros(v.size, v.dtype), 0, v.dtype.type(n_rows), v.dtype.type(damping)
    for layer in range(sizes.size - 1):
        n_weights += (sizes[layer] + 1) * sizes[layer + 1]
    for chunk in range(len(sums)):
        for k in range(n_weights):
            out[k] += sums[chunk, k]
    for k in range(n_weights):
        out[k] = out[k] / n_rows + damping * v[k]
    for k in range(n_weights, v.size):
        out[k] = v[k] + v[k] + damping * v[k]
    return out


def _fvp(theta, v, sizes, acts, jac, m, nvec, damping):
    """F v + damping v, E4, in v's dtype; J v and J^T are in theta's."""
    sums, n_rows = _jtu(theta, v.astype(theta.dtype, copy=False), sizes, acts, jac, m, nvec, None), len(m)
    if _ranks is not None:
        sums, n_rows = _mean_over_ranks(sums.sum(axis=0) / n_rows, n_rows)[None], 1  # it is the mean already
    return _mean_damped(sums, n_rows, v, sizes, float(damping))


def _solve(theta, b, sizes, acts, m, nvec, damping, config):
    """cg for (F + damping I) x = b: x, the residual's norm, iterations, status, and x^T F x without the damping.

    x^T F x = x . (b - r) - damping x . x costs no product; where that cancels four digits or more, it takes one.
    """
    damping, jac = float(damping), _jac(theta, sizes, acts, config.cg_iters)
    P = _preconditioner(theta, sizes, acts, m, nvec, damping) if config.precondition else lambda r: r

    def F(v, c=0.0):
        return _fvp(theta, v, sizes, acts, jac, m, nvec, c)

    x, r, n_iter, status = _cg(lambda p: F(p, damping), b, config.cg_iters, config.cg_tol, P)
    damped = damping * _dot(x, x)
    curvature = _dot(x, b) - _dot(x, r) - damped
    if curvature < 1e-4 * damped:
        curvature = _dot(x, F(x))
    return x, _dot(r, r) ** 0.5, n_iter, status, curvature


def _solve_to_tol(theta, b, sizes, acts, m, nvec, damping, config):
    """_solve; where a cg_tol of 1e-3 or more asks for few digits of x, with products in float32, and the rest as it is.

    Training CartPole-v1 in float64 takes a tenth less time so on one thread, a thirtieth on two.  With the settings'
    defaults x moves by about 1e-5 of its length; where observations are not normalised and damping is small, the solve
    can come a tenth less far.  Where float32 overflows, or finds no curvature, float64 decides.
    """
    if theta.dtype == np.float64 and config.cg_tol >= 1e-3:
        theta_32, acts_32, m_32 = (each.astype(np.float32) for each in (theta, acts, m))
        scale = float(np.abs(b).max()) or 1.0  # so that float32 can hold b
        b_scaled = b / scale
        x, residual, n_iter, status, curvature = _solve(theta_32, b_scaled, sizes, acts_32, m_32, nvec, damping, config)
        if status in (CONVERGED, ITERATION_LIMIT) and 0 < curvature < np.inf:
            return x * scale, residual * scale, n_iter, status, curvature * (scale * scale)
    return _solve(theta, b, sizes, acts, m, nvec, damping, config)


# =========================================================================== the policy as a function of its parameters
@_one_blas_thread()
def init_params(policy, rng, dtype=np.float64, *, init_std=2.4):
    """theta (P,): orthogonal weights, those of the last layer scaled by 0.01, biases 0, sigma min(1, init_std / A).

    Orthogonal: Saxe et al. 2014.  A small last layer makes the first policy the same in every state.  Less noise for
    more actions, each of which costs control; 2.4 was tuned on Hopper, HalfCheetah and Ant (3, 6 and 8 actions).
    """
    _check_policy(policy)
    _check_number("init_std", init_std, float, "(0, inf)")
    theta = _finite("theta", np.zeros(n_params(policy)), (None,), dtype)
    sizes = np.array(policy.sizes)
    for layer in range(len(sizes) - 1):
        W, _ = _layer(theta, sizes, layer)
        q, r = scipy.linalg.qr(rng.standard_normal((max(W.shape), min(W.shape))), mode="economic")
        q *= np.sign(np.diag(r))  # makes q uniform over the orthogonal matrices
        W[:] = (q if W.shape[0] >= W.shape[1] else q.T) * (0.01 if layer == len(sizes) - 2 else 1.0)
    theta[_n_weights(policy) :] = np.log(min(1.0, init_std / policy.sizes[-1]))
    return theta


def _outputs(policy, theta, acts):
    """mu (N, K) out of acts: the network's outputs, and log_std beside them for a Gaussian."""
    n_rows = acts.size // sum(policy.sizes)
    out = acts[acts.size - n_rows * policy.sizes[-1] :].reshape(n_rows, -1)
    if policy.head != "gaussian":
        return out
    return np.concatenate([out, np.broadcast_to(theta[-policy.sizes[-1] :], out.shape)], axis=1)


@_one_blas_thread()
def forward(policy, theta, obs):
    """Head outputs mu (N, K) for obs (N, D).  Raises ValueError where shapes do not fit or numbers are not finite."""
    theta, obs = _check_inputs(policy, theta, obs)
    return _outputs(policy, theta, _activations(theta, np.array(policy.sizes), obs))


@_one_blas_thread()
def jvp(policy, theta, obs, v):
    """J v (N, K): the derivative of mu at theta along v (P,)."""
    theta, obs = _check_inputs(policy, theta, obs)
    v = _finite("v", v, theta.shape, theta.dtype)
    sizes = np.array(policy.sizes)
    acts = _activations(theta, sizes, obs)
    dacts = np.zeros_like(acts)
    _jvp_block(theta, v, sizes, acts, acts[:0], dacts, np.zeros_like(acts), 0, len(obs))
    return _outputs(policy, v, dacts)


@_one_blas_thread()
def vjp(policy, theta, obs, u):
    """J^T u (P,): the gradient in theta of the sum over rows of mu . u, for u (N, K).  Adjoint of jvp."""
    theta, obs = _check_inputs(policy, theta, obs)
    u = _finite("u", u, (len(obs), n_outputs(policy)), theta.dtype)
    return _vjp(policy, theta, _activations(theta, np.array(policy.sizes), obs), u)


def _vjp(policy, theta, acts, u):
    n_out, sizes = policy.sizes[-1], np.array(policy.sizes)
    sums = _jtu(theta, None, sizes, acts, None, None, None, np.ascontiguousarray(u[:, :n_out]))
    grad = sums.sum(axis=0)
    if policy.head == "gaussian":  # log_std is each row's own output: its part of J is the identity
        grad[-n_out:] = u[:, n_out:].sum(axis=0)
    return grad


@_one_blas_thread()
def fvp(policy, theta, obs, v, damping=0.0):
    """F v + damping v (P,), F v = mean_n J_n^T M_n J_n v, E4: the Hessian of D(theta, .) at theta times v.

    Forward mode, M and reverse mode in turn: no second derivative, and F is never formed.
    The KL and its gradient are 0 at theta, so this Hessian is all there is to the KL nearby; the term with second
    derivatives of mu vanishes because it carries that gradient.
    """
    theta, obs = _check_inputs(policy, theta, obs)
    v = _finite("v", v, theta.shape, theta.dtype)
    _check_number("damping", damping, float, "[0, inf)")
    acts = _activations(theta, np.array(policy.sizes), obs)
    sizes, acts, m, nvec = _fisher(policy, acts, _outputs(policy, theta, acts))
    return _fvp(theta, v, sizes, acts, acts[:0], m, nvec, damping)


def _fisher(policy, acts, mu):
    """What _solve needs to know of F: sizes, acts, what M is made of in the network's outputs, nvec."""
    m = _metric_diagonal(policy, mu)[:, : policy.sizes[-1]]
    return np.array(policy.sizes), acts, np.ascontiguousarray(m), np.array(policy.nvec, np.int64)


# ========================================================================================== E1 to E7: the policy update
def _weighted_ratio(policy, mu, batch):
    """w_n pi(a_n|s_n) / pi_old(a_n|s_n) (N,), E1; in groups, divided by the mean over the group, E10."""
    log_ratio = np.zeros(len(mu), mu.dtype)
    if mu is not batch.mu_old:  # trpo_update asks for E3 and L(old) with that: an update on CartPole-v1 is 6% faster
        log_ratio = log_prob(policy, mu, batch.actions) - log_prob(policy, batch.mu_old, batch.actions)
    ratio = batch.weights * np.exp(log_ratio)
    return ratio / _group_mean(ratio, batch.group) if batch.group > 1 else ratio


def _surrogate(policy, mu, batch):
    return float(_mean_over_ranks(np.mean(_weighted_ratio(policy, mu, batch) * batch.adv), len(mu)))


def surrogate(policy, theta, batch):
    """L(theta) = mean_n w_n pi_theta(a_n|s_n) / pi_old(a_n|s_n) A_n, E1, to be maximised.

    In groups of K rows, E10: the mean over states of sum_k r_k A_k / sum_k r_k, r_k = w_k pi_theta / pi_old.  With
    every action of a state and w_k = K pi_old(a_k) that is the full sum over actions, sum_a pi_theta(a|s) A(s, a).
    """
    theta, batch = _check_batch(policy, theta, batch)
    return _surrogate(policy, forward(policy, theta, batch.obs), batch)


def _surrogate_grad(policy, theta, acts, mu, batch):
    ratio, adv = _weighted_ratio(policy, mu, batch), batch.adv
    if batch.group > 1:  # the derivative of the normalisation
        adv = adv - _group_mean(ratio * adv, batch.group)
    per_row = ratio * adv / len(mu)
    return _mean_over_ranks(_vjp(policy, theta, acts, score(policy, mu, batch.actions) * per_row[:, None]), len(mu))


@_one_blas_thread()
def surrogate_grad(policy, theta, batch):
    """grad L (P,) at theta: mean_n J_n^T score_n w_n ratio_n A_n; E3 where theta is old and every ratio is 1.

    In groups, E10: w_n ratio_n is self-normalised, and A_n counts from its mean over the group so weighted.
    """
    theta, batch = _check_batch(policy, theta, batch)
    acts = _activations(theta, np.array(policy.sizes), batch.obs)
    return _surrogate_grad(policy, theta, acts, _outputs(policy, theta, acts), batch)


def _trust_region_step(net, params, acts, mu, grad, objective, divergence, radius, longest, config):
    """Uphill along (F + c I)^-1 grad as far as the quadratic model allows, then backtracking: E4 to E7.

    c is damping; of a Gaussian, damping times mean 1 / 3 sigma^2: 1 where actions are as spread as uniform ones in
    [-1, 1].  As sigma falls, F grows so in the weights, and stays 2 I in log_std: with c constant, damping would fade,
    and sigma fall on.
    No candidate is further than longest times that direction.  objective(mu) is a number, divergence(mu) (N,) of each
    row.  The step kept has a mean divergence <= radius and a larger objective; if none has, params come back as they
    are.  Returns (params, acts at them, their divergence, the fields of UpdateInfo about the step).
    """
    sizes, n_rows = np.array(net.sizes), acts.size // sum(net.sizes)
    obs, old = acts[: n_rows * net.sizes[0]].reshape(n_rows, -1), objective(mu)
    fisher = _fisher(net, acts, mu)
    unit = float(fisher[2][0].mean()) / 3 if net.head == "gaussian" else 1.0  # sigma is the same in every state
    step_dir, cg_residual, cg_iters, status, curvature = _solve_to_tol(  # E4, E5
        params, grad, *fisher, config.damping * unit, config
    )
    step = {"accepted": False, "kl": 0.0, "surrogate": old, "surrogate_old": old, "step_length": 0.0, "backtracks": 0}
    step |= {"curvature": curvature, "cg_iters": cg_iters, "cg_residual": cg_residual, "cg_status": status}
    if not grad.any():
        step["reason"] = "zero gradient"
    elif not 0 < curvature < np.inf:  # also where it is NaN
        step["reason"] = f"no step: curvature {curvature}, {status}"
    else:
        full = min(np.sqrt(2 * radius / curvature), longest)  # E6
        for j in range(config.max_backtracks):  # E7
            step_length = full * config.backtrack_coef**j
            candidate = params + params.dtype.type(step_length) * step_dir
            acts_new = mu_new = None  # frees the last candidate's before the next
            acts_new = _activations(candidate, sizes, obs)
            mu_new = _outputs(net, candidate, acts_new)
            moved = divergence(mu_new)
            mean = float(_mean_over_ranks(moved.mean(dtype=np.float64), n_rows))
            if mean <= radius and (new := objective(mu_new)) > old:  # neither is so for NaN
                step |= {"accepted": True, "reason": "accepted", "surrogate": new, "kl": mean}
                return candidate, acts_new, moved, step | {"step_length": float(step_length), "backtracks": j}
        step["reason"] = f"none of {config.max_backtracks} candidates was inside the trust region and better"
        step["backtracks"] = config.max_backtracks
    return params, acts, np.zeros(n_rows), step


@_one_blas_thread()
@np.errstate(all="ignore")  # what is not finite is looked for, and refused: no warning besides
def trpo_update(policy, theta, batch, config=Config()):
    """One trust-region step, E1 to E7: returns (theta, UpdateInfo); a pure function of its arguments.

    theta (P,) is the policy that sampled batch.  The new theta has mean KL <= max_kl and a larger surrogate, or is
    bitwise the old one where no backtrack has both.  The step does not depend on the scale of the advantages.
    Raises ValueError for wrong shapes, NaN or infinity, a config out of range, and if batch.mu_old is not theta's.
    """
    check_config(config)
    theta, batch = _check_batch(policy, theta, batch)
    _check_ranks_agree("theta or config", lambda: {"theta": theta, "config": np.array(str(config))})
    scale = _largest_over_ranks(float(np.abs(batch.weights * batch.adv).max())) or 1.0
    adv_largest = _largest_over_ranks(float(np.abs(batch.adv).max()))
    # weights times adv at most 1: the step stays the same, and no square overflows; what has no weight counts as 0
    adv = np.where(batch.weights != 0, batch.adv, 0) / scale
    if scale == np.inf or _largest_over_ranks(float(np.abs(adv).max())) == np.inf:
        raise ValueError(f"weights times adv, {scale:.3g}, and adv over that must be of a size {theta.dtype} can hold")
    batch = batch._replace(adv=adv)
    acts = _activations(theta, np.array(policy.sizes), batch.obs)
    mu_old = _outputs(policy, theta, acts)
    _check_mu_old(batch.mu_old, mu_old)
    batch = batch._replace(mu_old=mu_old)  # without rounding in between, every ratio at old is 1
    grad = _surrogate_grad(policy, theta, acts, mu_old, batch)  # E3
    L = functools.partial(_surrogate, policy, batch=batch)  # E1
    D = functools.partial(kl, policy, mu_old)  # E2
    theta, acts, kl_rows, step = _trust_region_step(  # E4 to E7
        policy, theta, acts, mu_old, grad, L, D, config.max_kl, np.inf, config
    )
    in_units = {name: step[name] * scale for name in ("surrogate", "surrogate_old", "cg_residual")}
    return theta, UpdateInfo(
        kl_largest=_largest_over_ranks(float(kl_rows.max())),
        adv_largest=adv_largest,
        entropy=float(_mean_over_ranks(entropy(policy, _outputs(policy, theta, acts)).mean(), len(kl_rows))),
        grad_norm=_dot(grad, grad) ** 0.5 * scale,
        **step | in_units,
    )


def improvement_lower_bound(surrogate_gain, adv_largest, kl_largest, gamma):
    """E11: what eta(new) - eta(old) is at least, eta being the expected discounted return.

    (surrogate_gain - 4 eps gamma max_s KL / (1 - gamma)) / (1 - gamma).  surrogate_gain: L(new) - L(old), a mean over
    the states that old visits, discounted; eps = adv_largest: the largest |A(s, a)|; kl_largest: max_s KL(old || new),
    nats; all three are in UpdateInfo, as far as its batch knows them.  The paper adds up over the states where E1 takes
    the mean, hence the last (1 - gamma).  Very loose: see the README.  Source: Schulman et al. 2015, theorem 1.
    """
    _check_number("gamma", gamma, float, "[0, 1)")
    _check_number("surrogate_gain", surrogate_gain, float, "(-inf, inf)")
    _check_number("adv_largest", adv_largest, float, "[0, inf)")
    _check_number("kl_largest", kl_largest, float, "[0, inf)")
    return (surrogate_gain - 4 * adv_largest * gamma * kl_largest / (1 - gamma)) / (1 - gamma)


# ============================================================================ E8, E9: advantages and the value function
@jit
def _gae(rewards, values, next_values, terminated, truncated, gamma, lam, adv):
    for e in range(adv.shape[1]):
        carry = 0.0
        for t in range(adv.shape[0] - 1, -1, -1):
            bootstrap = 0.0 if terminated[t, e] else gamma * next_values[t, e]
            delta = rewards[t, e] + bootstrap - values[t, e]
            carry = delta if terminated[t, e] or truncated[t, e] else delta + gamma * lam * carry
            adv[t, e] = carry


def gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    """Advantages and lambda-returns, each (T, E), of T steps in E environments, E8.

    delta_t = r_t + gamma V(s_t+1) - V(s_t);  A_t = delta_t + gamma lam A_t+1, up to the end of the episode or rollout.
    next_values holds V of the observation that each step led to, before any reset: it counts as 0 where terminated,
    and as it is where truncated.  Returns (A, A + V).  Source: Schulman et al. 2016.
    """
    values = _finite("values", values, (None, None))
    rewards, next_values = (
        _finite(name, array, values.shape, values.dtype)
        for name, array in (("rewards", rewards), ("next_values", next_values))
    )
    terminated, truncated = np.asarray(terminated, bool), np.asarray(truncated, bool)
    if not terminated.shape == truncated.shape == values.shape:
        raise ValueError(f"terminated and truncated must have shape {values.shape}, as values")
    _check_number("gamma", gamma, float, "[0, 1]")
    _check_number("lam", lam, float, "[0, 1]")
    adv = np.empty_like(values)
    _gae(rewards, values, next_values, terminated, truncated, float(gamma), float(lam), adv)
    return adv, adv + values


def _variance(x):
    mean = _mean_over_ranks(x.mean(dtype=np.float64), len(x))
    return float(_mean_over_ranks(np.square(x - mean, dtype=np.float64).mean(), len(x)))


@_one_blas_thread()
@np.errstate(all="ignore")  # as in trpo_update
def fit_value(value, phi, obs, returns, config=Config()):
    """E9: phi (Q,) after config.value_iters Gauss-Newton steps on mean_n (V_phi(s_n) - returns_n)^2 / 2.

    The output's bias takes the mean error first: with gamma near 1 the level of the returns keeps rising, and a step
    that had to follow it would fit nothing else.  The rest is fitted by a step like the policy's: V is the mean of a
    Gaussian of fixed variance, so M = I and F = mean_n J_n^T J_n is the Gauss-Newton matrix.  It is damped by
    value_damping times the variance of the returns, as the hidden layers' part of F goes with the square of the last
    layer's weights, and these with the returns.  They start small: returns should be of the order of 1, as
    normalize_reward makes them; those 30 times as large take several times as many fits.  There is no trust region:
    the whole step is tried first, then max_backtracks - 1 shorter ones, and the first that lowers the mean squared
    error is kept.  If none does, the fit is over.  No learning rate, no minibatches, no random numbers.  Raises
    ValueError for wrong shapes, NaN or infinity, and returns whose squares overflow.
    """
    check_config(config)
    phi, obs = _check_inputs(value, phi, obs, "phi")
    _check_ranks_agree("phi or config", lambda: {"phi": phi, "config": np.array(str(config))})
    if value.head != "value" or value.sizes[-1] != 1:
        raise ValueError(f"value must be a network with one output and the head 'value', got {value}")
    returns = _finite("returns", returns, (len(obs),), phi.dtype)[:, None]
    acts = _activations(phi, np.array(value.sizes), obs)
    level = _mean_over_ranks(np.mean(returns - _outputs(value, phi, acts), dtype=np.float64), len(obs))
    returns, variance = returns - phi.dtype.type(level), _variance(returns[:, 0])
    if not np.isfinite(level + variance):
        raise ValueError(f"the squares of returns overflow, of up to {np.abs(returns).max():.3g}")
    damped = config._replace(damping=config.value_damping * variance)

    def objective(new):
        return -float(_mean_over_ranks(np.square(returns - new, dtype=np.float64).mean(), len(obs)))

    def unbounded(new):
        return np.zeros(len(new))

    for _ in range(config.value_iters):
        values = _outputs(value, phi, acts)
        grad = _mean_over_ranks(_vjp(value, phi, acts, (returns - values) / len(obs)), len(obs))
        phi, acts, _, step = _trust_region_step(
            value, phi, acts, values, grad, objective, unbounded, np.inf, 1.0, damped
        )
        if not step["accepted"]:  # nor would the next be
            break
    phi = phi.copy()
    phi[-1] += level
    return phi


# =================================================================================================== running statistics
class RunningStats(NamedTuple):
    """Count, mean and sum of squared deviations of the rows seen so far.  Rows are not normalised at count 0."""

    count: float
    mean: np.ndarray  # (D,)
    m2: np.ndarray  # (D,)


@np.errstate(over="ignore")  # it is refused
def update_stats(stats, rows):
    """stats after rows (N, D) more.  Merges two-pass moments (Chan et al. 1983): nothing cancels."""
    rows = _finite("rows of observations or rewards", rows, (None, len(stats.mean)), np.float64)
    n, mean = _sum_over_ranks(len(rows)), _mean_over_ranks(rows.mean(axis=0), len(rows))
    total, delta = stats.count + n, mean - stats.mean
    spread = _sum_over_ranks(np.square(rows - mean).sum(axis=0))
    m2 = stats.m2 + spread + np.square(delta) * (stats.count * n / total)
    if not np.isfinite(m2).all():  # with which nothing could be normalised, nor the state be loaded
        raise ValueError(f"the squares of observations or rewards overflow, of up to {np.abs(rows).max():.3g}")
    return RunningStats(total, stats.mean + delta * (n / total), m2)


def _inverse_std(stats):
    """1 / sqrt(variance + 1e-8) (D,), so that noise about a constant is not blown up: what varies by much less than
    1e-4 stays small.  1 while there are no statistics."""
    return 1 / np.sqrt(stats.m2 / stats.count + 1e-8) if stats.count else np.ones_like(stats.mean)


def _normalizer(stats, D):
    """mean, 1 / std and the cut at 10 deviations of D features; 0, 1 and no cut while there are no statistics."""
    if not np.shape(stats.mean) == np.shape(stats.m2) == (D,):
        raise ValueError(f"the statistics must be of {D} features, got {stats}")
    return stats.mean, _inverse_std(stats), 10.0 if stats.count else np.inf


@jit
def _normalize_rows(raw, mean, inverse_std, limit, out):
    """out <- (raw - mean) / std, cut at +-limit; whether raw and out are finite throughout."""
    finite = True
    for i in range(raw.shape[0]):
        for k in range(raw.shape[1]):
            out[i, k] = min(max((raw[i, k] - mean[k]) * inverse_std[k], -limit), limit)
            finite &= np.isfinite(raw[i, k]) and np.isfinite(out[i, k])
    return finite


def normalize(stats, raw, dtype=np.float64):
    """Observations (N, D) as the networks see them, at most 10 deviations from 0; raw itself while stats is empty."""
    raw = _finite("obs", raw, (None, len(stats.mean)), np.float64)
    out = np.empty(raw.shape, dtype)
    if not _normalize_rows(raw, *_normalizer(stats, raw.shape[1]), out):
        raise ValueError(f"obs must be of a size that {out.dtype} can hold, got {np.abs(raw).max():.3g} at most")
    return out


# ============================================================================================== spaces and environments
def make_policy(observation_space, action_space, hidden=(64, 64)):
    """The Policy for two Gymnasium spaces: any observations that flatten to a vector; Box, Discrete, MultiDiscrete or
    MultiBinary actions of any shape.  Raises ValueError that names the space for anything else."""
    from gymnasium import spaces

    if not observation_space.is_np_flattenable:
        raise ValueError(
            f"observation space {observation_space} is not supported: it must flatten to a vector of fixed length "
            "(Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of these)"
        )
    shape, dtype = action_space.shape or (), np.dtype(action_space.dtype or object).name
    common = {"action_shape": shape, "action_dtype": dtype}
    if isinstance(action_space, spaces.Box):
        outputs, (low, high) = int(np.prod(shape)), np.array([action_space.low, action_space.high], float)
        head = {"head": "gaussian", "low": tuple(low.ravel().tolist()), "high": tuple(high.ravel().tolist())}
    elif isinstance(action_space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        nvec = 2 if isinstance(action_space, spaces.MultiBinary) else getattr(action_space, "nvec", None)
        nvec = np.broadcast_to(action_space.n if nvec is None else nvec, shape).ravel().tolist()
        start = np.broadcast_to(getattr(action_space, "start", 0), shape).ravel().tolist()
        outputs, head = sum(nvec), {"head": "categorical", "nvec": tuple(nvec), "start": tuple(start)}
    else:
        raise ValueError(
            f"action space {action_space} is not supported: it must be Box, Discrete, MultiDiscrete or MultiBinary"
        )
    return Policy((spaces.flatdim(observation_space), *hidden, outputs), **head, **common)


def _value_network(policy):
    return Policy((*policy.sizes[:-1], 1), "value")


@functools.lru_cache
def _action_range(policy):
    """Middle and half of the range of the actions (A,), 0 and 1 where that is infinite or half of it 1e6 or more; its
    ends."""
    low, high = np.array(policy.low or -np.inf), np.array(policy.high or np.inf)
    bounded = high / 2 - low / 2 < 1e6
    with np.errstate(invalid="ignore"):  # inf - inf, where it is not bounded
        return np.where(bounded, low / 2 + high / 2, 0.0), np.where(bounded, high / 2 - low / 2, 1.0), low, high


def _env_actions(policy, actions):
    """The environment's copy of actions (N, A).  A Gaussian's count in halves of the range, from its middle, so that
    all ranges are learned alike, and are clipped to the bounds; choices are counted from start.  Shape and dtype are
    those of the space.  What is learned from stays as it was sampled."""
    if policy.head == "gaussian":
        middle, half, low, high = _action_range(policy)
        actions = np.clip(middle + half * actions, low, high)
        actions = np.rint(actions) if policy.action_dtype.startswith(("int", "uint", "bool")) else actions
    else:
        actions = actions + np.array(policy.start or 0)
    shape = actions.shape[1:] if policy.action_shape is None else policy.action_shape
    return actions.reshape(-1, *shape).astype(policy.action_dtype)


def act(policy, theta, obs, obs_stats=None, rng=None):
    """The environment's actions for flat raw observations, one (D,) or a batch (N, D): the most likely ones, or
    sampled if rng is given.  obs_stats: those that theta was trained with, TrainState.obs_stats."""
    obs = np.asarray(obs, np.float64)
    rows = obs[None] if obs.ndim == 1 else obs
    mu = forward(policy, theta, normalize(obs_stats, rows) if obs_stats else rows)
    if rng is not None:
        actions = sample(policy, mu, rng)
    elif policy.head == "gaussian":
        actions = mu[:, : policy.sizes[-1]]
    else:
        actions = np.stack([logits.argmax(axis=0) for logits in _parts(policy, mu)], axis=1)
    actions = _env_actions(policy, actions)
    return actions if obs.ndim > 1 else actions[0]


def flatten_obs(space, obs, n):
    """n observations of a Gymnasium space, batched as its vector environments batch them, as float64 (n, D): of a Box
    perhaps a view of the environment's own array, which its next step may overwrite."""
    from gymnasium import spaces, vector

    if isinstance(space, spaces.Box):
        return np.asarray(obs, np.float64).reshape(n, -1)
    rows = vector.utils.iterate(vector.utils.batch_space(space, n), obs)
    return np.stack([spaces.flatten(space, row) for row in rows]).astype(np.float64)


def _make_env(env, /, **options):
    """An environment as it is, or made from its id or by calling env; ValueError of one sentence where that fails."""
    import gymnasium as gym

    if isinstance(env, (gym.Env, gym.vector.VectorEnv)):
        return env
    try:
        made = gym.make(env, **options) if isinstance(env, str) else env() if callable(env) else None
    except Exception as error:  # what a constructor raises at its arguments is its own choice
        why = str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"cannot make the environment {env}: {why}") from error
    if not isinstance(made, (gym.Env, gym.vector.VectorEnv)):
        raise ValueError(f"env must be an id, a gym.Env, a VectorEnv or a callable that makes one, got {env!r}")
    return made


def _without_infos(env):
    """env, each step's info left empty.  Without autoreset nothing reads it, and a VectorEnv gathers it entry by entry:
    a tenth of the time of HalfCheetah-v5's steps, a seventh where each environment is in a process."""
    import gymnasium as gym

    class WithoutInfos(gym.Wrapper):
        spec = env.spec

        def step(self, action):
            transition = self.env.step(action)
            if len(transition) != 5:
                raise ValueError(f"step must return 5 things, as Gymnasium's do, got {len(transition)} from {self.env}")
            return *transition[:4], {}

    return WithoutInfos(env)


def _make_one(env, options, trainer):
    """One environment of a vector; a process other than trainer leaves Ctrl-C to it from here on, and ends at
    SIGTERM."""
    if os.getpid() != trainer:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return _without_infos(_make_env(env, **options))


@contextlib.contextmanager
def _closing(envs):
    """Closes envs at the end, whatever close raises: what was learned must come back.  After an error, or where one of
    their processes has ended, it kills these first: AsyncVectorEnv would wait for their answers."""
    failed, processes = True, getattr(envs, "processes", ())
    try:
        yield envs
        failed = False
    finally:
        if failed or not all(process.is_alive() for process in processes):
            for process in processes:
                process.kill()
                process.join()
                envs.closed = True
        try:
            envs.close()
        except BaseException as error:
            warnings.warn(f"{envs} was not closed: {error!r}", stacklevel=1)


def _make_envs(env, config, /, **options):
    """env (see train) as a VectorEnv, and whether it was made here."""
    import gymnasium as gym
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

    first = _make_env(env, **options)
    if isinstance(first, VectorEnv):
        return first, first is not env
    as_one = isinstance(env, str) and str(first.spec.vector_entry_point).startswith("gymnasium.")  # as CartPole's
    if config.vector == "own" and as_one and not options and config.sampling != "vine":
        first.close()
        n_envs = config.num_envs or max(1, 16 // (_ranks.size if _ranks else 1))
        return gym.make_vec(env, n_envs, vectorization_mode="vector_entry_point"), True
    n_envs, one = config.num_envs or 4, functools.partial(_make_one, env, options, os.getpid())
    # DISABLED: with SAME_STEP, the last observation of an environment that reuses its buffer is lost to the reset
    if config.vector == "async":
        if first is env:
            raise ValueError(f"vector='async' needs an id, or a callable to call in other processes, got {env}")
        make_policy(first.observation_space, first.action_space)  # says which spaces are not supported
        first.close()
        envs = AsyncVectorEnv([one] * n_envs, autoreset_mode=AutoresetMode.DISABLED, copy=False)
        envs.spec = first.spec  # asked for later, it would have to cross a pipe, which not every spec can
        return envs, True
    others = [] if first is env else [one] * (n_envs - 1)
    envs = SyncVectorEnv([lambda: _without_infos(first), *others], autoreset_mode=AutoresetMode.DISABLED, copy=False)
    if len({id(each.unwrapped) for each in envs.envs}) < envs.num_envs:
        raise ValueError("the callable must make a new environment at each call, got the same one again")
    return envs, first is not env


def _spec(envs):
    """The registered EnvSpec of a VectorEnv or of its first environment; None if it has none."""
    from gymnasium.envs.registration import EnvSpec

    spec = envs.spec or (envs.get_attr("spec")[0] if hasattr(envs, "get_attr") else None)
    return spec if isinstance(spec, EnvSpec) else None  # EnvPool has another class of that name


# ================================================================================ saving and restoring environments
def _layers(env):
    """env, what it wraps, and so on down to the environment itself."""
    layers = [env]
    while layers[-1] is not env.unwrapped:
        layers.append(layers[-1].env)
    return layers


def _shared(layers):
    """A memo for copy.deepcopy of what no copy is made of: the layers themselves, and MuJoCo's model and data."""
    native = [each for layer in layers for each in vars(layer).values() if type(each).__name__ in ("MjModel", "MjData")]
    return {id(each): each for each in (*layers, *native)}


def _physics(env):
    """Of an environment of MuJoCo: model, data, what mj_getState is to save, and the arrays in data; else nothing.

    The arrays, because Ant and Humanoid read the positions of bodies before they step, which are not in that state and
    lag it by a substep.  Copies of data itself would do too, but reserve 14 MB each.
    """
    data = vars(env.unwrapped).get("data")
    if type(data).__name__ != "MjData":
        return ()
    import mujoco

    arrays = {name: getattr(data, name) for name, each in vars(type(data)).items() if isinstance(each, property)}
    arrays = {name: each for name, each in arrays.items() if isinstance(each, np.ndarray)}
    return env.unwrapped.model, data, mujoco.mjtState.mjSTATE_INTEGRATION, arrays


def save_env(env):
    """All that env and its wrappers know, for restore_env.

    Attribute by attribute: a deepcopy of the environment itself would be a new one, not yet reset, where its class is
    an EzPickle, as all of MuJoCo's are.
    """
    layers, physics = _layers(env), _physics(env)
    if physics:
        import mujoco

        model, data, spec, arrays = physics
        state = np.empty(mujoco.mj_stateSize(model, spec))
        mujoco.mj_getState(model, data, state, spec)
        physics = state, {name: array.copy() for name, array in arrays.items()}
    return copy.deepcopy([vars(layer) for layer in layers], _shared(layers)), physics


def restore_env(env, saved):
    """Put env back to where save_env(env) was called, random generators included; saved stays as it is."""
    layers, (attributes, physics) = _layers(env), saved
    for layer, old in zip(layers, copy.deepcopy(attributes, _shared(layers)), strict=True):
        vars(layer).clear()
        vars(layer).update(old)
    if physics:
        import mujoco

        (state, old), (model, data, spec, arrays) = physics, _physics(env)
        mujoco.mj_setState(model, data, state, spec)
        for name, array in arrays.items():
            if array.shape == old[name].shape:  # those of the contacts, made anew by each step, come and go
                array[...] = old[name]


def _check_restorable(env):
    """ValueError of one sentence unless env, restored after a reset, repeats 100 transitions bit for bit, twice."""
    from gymnasium.spaces import flatten

    space = copy.deepcopy(env.action_space)
    space.seed(0)
    actions = [space.sample() for _ in range(110)]

    def play(actions):
        for action in actions:
            obs, reward, terminated, truncated, _ = env.step(action)
            yield flatten(env.observation_space, obs).tobytes(), repr((reward, terminated, truncated))
            if terminated or truncated:
                yield flatten(env.observation_space, env.reset()[0]).tobytes()

    try:
        before = save_env(env)
        env.reset(seed=0)
        list(play(actions[:10]))
        saved = save_env(env)
        first, repeats = list(play(actions[10:])), []
        for elsewhere in (0, 7):  # where the environment is when it is restored: at a start, then some steps off
            env.reset()
            list(play(actions[:elsewhere]))
            restore_env(env, saved)
            env.np_random = env.np_random  # branch sets it, which some classes refuse
            repeats.append(list(play(actions[10:])))
        why = None if repeats == [first, first] else "restored, it does not repeat the same transitions"
        restore_env(env, before)
    except Exception as error:  # what a class raises that cannot be copied is its own choice
        why = repr(error)
    if why:
        raise ValueError(f"vine sampling needs environments that can be saved and restored, not {env.unwrapped}: {why}")


# ============================================================================================================= sampling
class Runner(NamedTuple):
    """Where the environments stand between rollouts."""

    obs: np.ndarray  # (E, D) raw, float64
    resetting: np.ndarray  # (E,) the next step only resets: NEXT_STEP autoreset after the end of an episode
    episode_return: np.ndarray  # (E,) raw rewards so far
    episode_length: np.ndarray  # (E,)
    discounted: np.ndarray  # (E,) g of raw rewards: g <- gamma g + r at each step, 0 where an episode starts


class Rollout(NamedTuple):
    """T steps in E environments.  Rows where real is False were resets and are not to be learned from."""

    raw_obs: np.ndarray  # (T, E, D)
    obs: np.ndarray  # (T, E, D) as the policy saw them
    mu: np.ndarray  # (T, E, K)
    actions: np.ndarray  # (T, E, A) as sampled
    rewards: np.ndarray  # (T, E) raw
    terminated: np.ndarray  # (T, E)
    truncated: np.ndarray  # (T, E)
    real: np.ndarray  # (T, E)
    discounted: np.ndarray  # (T, E) as in Runner; its deviation is the scale of the rewards; 0 in branches
    last_obs: np.ndarray  # (E, D) raw, after the last step
    final_at: list  # (t, e) of each row that was truncated and not terminated
    final_obs: list  # (D,) raw, the last observation of each: what the row bootstraps from
    episodes: list  # (return, length) of each episode that ended
    saved: list  # (t, [save_env of each environment]) before some of the steps: the rollout set of vine sampling


@jit
def _act_rows(theta, sizes, nvec, log_std, raw, mean, inverse_std, limit, noise, acts, obs, mu, actions):
    """One vector step of the policy in one compiled call: normalise, forward, sample.  Whether raw was finite."""
    n_rows = raw.shape[0]
    finite = _normalize_rows(raw, mean, inverse_std, limit, obs)
    _copy(obs, _rows(acts, sizes, 0, 0, n_rows))
    for i in range(0, n_rows, BLOCK):
        _forward_block(theta, sizes, acts, i, min(i + BLOCK, n_rows))
    _copy(_rows(acts, sizes, sizes.size - 1, 0, n_rows), mu)
    for i in range(n_rows):
        for k in range(log_std.size):
            mu[i, mu.shape[1] - log_std.size + k] = log_std[k]
    _sample_rows(mu, nvec, noise, actions)
    return finite


def _actor(policy, theta, obs_stats, n_rows):
    """step(raw, noise, obs, mu, actions): one vector step of the policy, out of raw (n_rows, D) and noise."""
    fixed = theta, np.array(policy.sizes), np.array(policy.nvec, np.int64), theta[_n_weights(policy) :]
    normalizer, acts = _normalizer(obs_stats, policy.sizes[0]), np.empty(n_rows * sum(policy.sizes), theta.dtype)

    def step(raw, noise, obs, mu, actions):
        _check_observed(_act_rows(*fixed, raw, *normalizer, noise, acts, obs, mu, actions), raw)

    return step


def _first_runner(envs, seed):
    n, zeros = envs.num_envs, np.zeros(envs.num_envs)
    obs, _ = envs.reset(seed=seed)
    return Runner(flatten_obs(envs.single_observation_space, obs, n), np.zeros(n, bool), zeros, zeros, zeros)


@jit
def _running(x, ended, decay, before):
    """y (T, E) with y_t = x_t + decay y_t-1 in each column; y_t-1 is before (E,) in row 0, and 0 after the end of an
    episode.  Also the before of the rows that follow these."""
    y, before = np.empty_like(x), before.copy()
    for t in range(len(x)):
        for e in range(before.size):
            y[t, e] = x[t, e] + decay * before[e]
            before[e] = 0.0 if ended[t, e] else y[t, e]
    return y, before


def _check_observed(finite, obs):
    if not finite:
        obs = np.atleast_2d(obs)
        worst = obs[np.nan_to_num(np.abs(obs), nan=np.inf).max(axis=1).argmax()]
        raise ValueError(f"the environment returned an observation with NaN or infinity in the policy's dtype: {worst}")


def _check_rewards(rewards):
    if not np.isfinite(rewards).all():
        raise ValueError(f"the environment returned a reward of {rewards[~np.isfinite(rewards)][0]}")


@_one_blas_thread()
def collect(envs, policy, theta, obs_stats, runner, rng, n_steps, gamma=0.995, n_saved=0):
    """n_steps of every environment under theta, from where runner stands (None: resets them): (Rollout, Runner).

    The rows are those of a serial loop in each environment, whatever the autoreset mode, except the last observations
    of environments that reuse an array, in SAME_STEP.  obs_stats stays as it is.
    The environments are saved, for branch, before n_saved of the steps, one in each of so many equal stretches.
    Raises ValueError where an observation or a reward is not finite.
    """
    from gymnasium.spaces import flatten
    from gymnasium.vector import AutoresetMode

    theta, runner = _check_theta(policy, theta), runner or _first_runner(envs, int(rng.integers(2**31)))
    _check_number("n_steps", n_steps, int, "[1, inf)")
    _check_number("n_saved", n_saved, int, f"[0, {n_steps}]")
    mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    E, D, K, space = envs.num_envs, policy.sizes[0], n_outputs(policy), envs.single_observation_space
    if runner.obs.shape != (E, D):
        raise ValueError(f"runner must be of {E} environments with {D} features, got {runner.obs.shape}")
    raw_obs, obs = np.empty((n_steps + 1, E, D)), np.empty((n_steps, E, D), theta.dtype)
    mu, (noise, actions) = np.empty((n_steps, E, K), theta.dtype), _draw(policy, rng, (n_steps, E), theta.dtype)
    rewards, (terminated, truncated) = np.empty((n_steps, E)), np.empty((2, n_steps, E), bool)
    real = np.ones((n_steps + 1, E), bool)  # False: no episode is under way, whatever the environment says
    real[0] = ~runner.resetting
    step, edges = _actor(policy, theta, obs_stats, E), np.arange(n_saved + 1) * n_steps // max(n_saved, 1)
    save_at = set(rng.integers(edges[:-1], edges[1:]).tolist())  # by chance: episodes may be as long as the stretches
    raw_obs[0], final_at, final_obs, saved = runner.obs, [], [], []
    for t in range(n_steps):
        if t in save_at:
            saved.append((t, [save_env(env) for env in envs.envs]))
        step(raw_obs[t], noise[t], obs[t], mu[t], actions[t])
        seen, rewards[t], terminated[t], truncated[t], infos = envs.step(_env_actions(policy, actions[t]))
        raw_obs[t + 1] = flatten_obs(space, seen, E)
        ended = (terminated[t] | truncated[t]) & real[t]
        if ended.any():
            for e in np.flatnonzero(ended & ~terminated[t]):
                same_step = mode == AutoresetMode.SAME_STEP
                final_at.append((t, e))
                final_obs.append(flatten(space, infos["final_obs"][e]) if same_step else raw_obs[t + 1, e].copy())
                _check_observed(np.isfinite(final_obs[-1]).all(), final_obs[-1])
            if mode == AutoresetMode.NEXT_STEP:
                real[t + 1] = ~ended
                raw_obs[t + 1, ended] = np.nan_to_num(raw_obs[t + 1, ended], posinf=0, neginf=0)  # as it is acted on
            elif mode == AutoresetMode.DISABLED:
                raw_obs[t + 1] = flatten_obs(space, envs.reset(options={"reset_mask": ended})[0], E)
    raw_obs, last_obs = raw_obs[:n_steps], raw_obs[n_steps]
    _check_observed(np.isfinite(last_obs).all(), last_obs)
    resetting, real = ~real[n_steps], real[:n_steps]
    terminated, truncated, rewards[~real] = terminated & real, truncated & real, 0
    _check_rewards(rewards)
    ended = terminated | truncated
    discounted, running = _running(rewards, ended, float(gamma), runner.discounted)
    returns, episode_return = _running(rewards, ended, 1.0, runner.episode_return)
    lengths, episode_length = _running(real.astype(float), ended, 1.0, runner.episode_length)
    episodes = list(zip(returns[ended].tolist(), lengths[ended].astype(int).tolist(), strict=True))
    ends = last_obs, final_at, final_obs, episodes, saved
    rollout = Rollout(raw_obs, obs, mu, actions, rewards, terminated, truncated, real, discounted, *ends)
    return rollout, Runner(last_obs, resetting, episode_return, episode_length, running)


# =================================================================================================== E10: vine sampling
def _every_action(policy, most):
    """All joint choices (K, A) of a categorical policy if there are no more than most; else None."""
    few = policy.head == "categorical" and np.prod(policy.nvec, dtype=float) <= most
    return np.indices(policy.nvec).reshape(len(policy.nvec), -1).T if few else None


def _n_actions(policy, config):
    every = _every_action(policy, config.vine_actions)
    return config.vine_actions if every is None else len(every)


@_one_blas_thread()
def branch(envs, policy, theta, obs_stats, rollout, rng, config):
    """From each state in rollout.saved, K branches of at most vine_steps steps: a Rollout whose columns are branches.

    The first actions are every action of a small discrete space, else samples.  The K branches of a state, side by
    side, share their random numbers: the noise of the later actions, and a new np_random for the environment.  At the
    end the environments are back where they were.  Source: Schulman et al. 2015, section 5.2.
    """
    from gymnasium.spaces import flatten

    envs, every, theta = envs.envs, _every_action(policy, config.vine_actions), _check_theta(policy, theta)
    S, K, H, E = len(rollout.saved), _n_actions(policy, config), config.vine_steps, len(envs)
    shape, D = (S, K, H, E), policy.sizes[0]
    noise, actions = _draw(policy, rng, shape, theta.dtype)
    noise[:, :, 1:], env_seeds = noise[:, :1, 1:], rng.integers(2**63, size=(S, E))
    raw_obs, last_obs, rewards = np.zeros((*shape, D)), np.zeros((S, K, E, D)), np.zeros(shape)
    obs, mu = np.zeros((*shape, D), theta.dtype), np.zeros((*shape, n_outputs(policy)), theta.dtype)
    terminated, truncated, real = np.zeros((3, *shape), bool)
    step, before = _actor(policy, theta, obs_stats, E), [save_env(env) for env in envs]
    for s, k in np.ndindex(S, K):
        t, saved = rollout.saved[s]
        for env, each, seed in zip(envs, saved, env_seeds[s], strict=True):
            restore_env(env, each)
            env.np_random = np.random.default_rng(seed)
        current = last_obs[s, k]  # of a branch that has ended, it stays as it is: nothing follows
        current[:] = rollout.raw_obs[t]
        for at in ((s, k, i) for i in range(H)):
            raw_obs[at] = current
            step(raw_obs[at], noise[at], obs[at], mu[at], actions[at])
            if at[2] == 0 and every is not None:
                actions[at] = every[k]
            real[at] = ~(terminated[s, k] | truncated[s, k]).any(axis=0)
            env_actions = _env_actions(policy, actions[at])
            for e in np.flatnonzero(real[at]):
                seen, rewards[(*at, e)], terminated[(*at, e)], truncated[(*at, e)], _ = envs[e].step(env_actions[e])
                if not terminated[(*at, e)]:
                    current[e] = flatten(envs[e].observation_space, seen)
        _check_observed(np.isfinite(current).all(), current)
    _check_rewards(rewards)
    for env, each in zip(envs, before, strict=True):
        restore_env(env, each)

    def columns(array):  # (S, K, H, E, ...) -> (H, S E K, ...)
        return array.transpose(2, 0, 3, 1, *range(4, array.ndim)).reshape(array.shape[2], S * E * K, *array.shape[4:])

    arrays = obs, mu, actions, rewards, terminated, truncated, real, np.zeros(shape)
    (last_obs,), cut = columns(last_obs[:, :, None]), columns(truncated & ~terminated)
    final_at = [tuple(at) for at in np.argwhere(cut)]
    ends = last_obs, final_at, [last_obs[column] for _, column in final_at], [], []
    return Rollout(columns(raw_obs), *(columns(array) for array in arrays), *ends)


# ============================================================================================================= training
class TrainState(NamedTuple):
    """All that training carries from one update to the next, except the environments and earlier rollouts."""

    env: str  # its id, or what it calls itself
    env_args: dict  # of gym.make, with which --resume and --eval make it
    seed: int
    config: Config
    policy: Policy
    theta: np.ndarray  # (P,)
    value: Policy
    phi: np.ndarray  # (Q,)
    obs_stats: RunningStats
    reward_stats: RunningStats
    rng_state: dict  # of the np.random.Generator
    powers: tuple[float, float] = (0.0, 0.0)  # mean adv^2 and variance of the returns so far, as kl_memory weighs them
    steps: int = 0  # environment steps taken
    updates: int = 0
    episodes: int = 0  # finished
    returns: tuple[float, ...] = ()  # raw returns of the last 100 episodes
    lengths: tuple[int, ...] = ()
    solved: bool = False

    def act(self, obs, rng=None):
        """The environment's actions for raw observations, one (D,) or a batch (N, D): see act."""
        return act(self.policy, self.theta, obs, self.obs_stats, rng)


def _check_state(state):
    if not isinstance(state, TrainState):
        raise ValueError(f"state must be a TrainState, as train and load return, got {state!r}")


def _env_args(spec):
    """The arguments of gym.make for another environment of spec, without wrappers; none where JSON, and so a
    checkpoint, cannot hold them."""
    import gymnasium as gym

    not_kept = {"render_mode", "num_envs", "vectorization_mode", "vector_kwargs", "wrappers"}  # of gym.make_vec
    args = {name: value for name, value in spec.kwargs.items() if name not in not_kept}
    registered = gym.registry.get(spec.id)
    limit = args.pop("max_episode_steps", spec.max_episode_steps)  # make_vec passes it on
    if registered is not None and limit != registered.max_episode_steps:
        args["max_episode_steps"] = -1 if limit is None else limit  # None would be the registered one
    with contextlib.suppress(TypeError, ValueError):
        return json.loads(json.dumps(args))
    return {}


def init_state(env, policy, config, seed, env_args=None):
    """The TrainState before the first step."""
    rng, value = np.random.default_rng(seed), _value_network(policy)
    dtype = np.dtype(config.dtype)
    theta, phi = init_params(policy, rng, dtype, init_std=config.init_std), init_params(value, rng, dtype)
    empty = [RunningStats(0.0, np.zeros(n), np.zeros(n)) for n in (policy.sizes[0], 1)]
    return TrainState(env, env_args or {}, seed, config, policy, theta, value, phi, *empty, rng.bit_generator.state)


def _centre(adv, weights=1.0, group=None):
    """adv minus its weighted mean over each group (None: over all); all 0 in a group where nothing is left but that
    mean's rounding, so that equal advantages give no step."""
    mean = _group_mean(weights * adv, group) if group else _mean_over_ranks(adv.mean(), len(adv))
    group, centred = group or len(adv), adv - mean
    digits = (16 + np.log2(group)) * np.finfo(adv.dtype).eps  # NumPy's mean: 8 sums of 16 rows, then by halves
    noise = digits * np.abs(adv).reshape(-1, group).max(axis=1)
    return np.where(np.repeat(np.abs(centred).reshape(-1, group).max(axis=1) > noise, group), centred, 0)


def _advantages(state, rollout, rewards):
    """gae of a rollout: values of all rows at once, then of what followed the last row and each truncated one."""
    T, E, D = rollout.obs.shape

    def V(obs):
        return forward(state.value, state.phi, obs)[:, 0]

    values = V(rollout.obs.reshape(T * E, D)).reshape(T, E)
    after = V(normalize(state.obs_stats, np.stack([*rollout.last_obs, *rollout.final_obs]), values.dtype))
    next_values = np.concatenate([values[1:], after[None, :E]])
    for (t, e), final_value in zip(rollout.final_at, after[E:], strict=True):
        next_values[t, e] = final_value
    config = state.config
    return gae(rewards, values, next_values, rollout.terminated, rollout.truncated, config.gamma, config.lam)


def _vine_batch(policy, config, branches, adv):
    """E10: the first step of each branch; adv is Q - V with Q the lambda-return of the branch, closed with V."""
    obs, actions, mu, K = branches.obs[0], branches.actions[0], branches.mu[0], _n_actions(policy, config)
    full = _every_action(policy, config.vine_actions) is not None
    weights = K * np.exp(log_prob(policy, mu, actions)) if full else np.ones_like(adv[0])
    return Batch(obs, actions, _centre(adv[0], weights, K), mu, weights, K)


def _real_rows(rollout, *arrays):
    """The real rows of arrays (T, E, ...), environment by environment."""
    return [x.swapaxes(0, 1)[rollout.real.T] for x in arrays]


def _targets(state, rollout, branches, earlier, scale):
    """What an iteration learns from, rewards times scale: the policy's batch, observations and returns for the value
    function, the variance of the rollout's returns, and the fraction of it that the value function explained before.

    The rows of one rollout are alike.  Every n-th row of n rollouts is as many rows, less alike, and from the n-th
    rollout on each row once in n updates.  Earlier rollouts are normalised and valued as of now; that they are of
    earlier policies goes uncorrected.
    """
    adv, returns = _advantages(state, rollout, rollout.rewards * scale)
    adv, obs, actions, mu, returns = _real_rows(rollout, adv, rollout.obs, rollout.actions, rollout.mu, returns)
    variance, rows = _variance(returns), [(obs, returns)]
    explained = float(1 - _variance(adv) / variance) if variance > 0 else 0.0
    for each in reversed(earlier):
        flat = each.raw_obs.reshape(-1, each.raw_obs.shape[-1])
        each = each._replace(obs=normalize(state.obs_stats, flat, obs.dtype).reshape(each.obs.shape))
        rows.append(_real_rows(each, each.obs, _advantages(state, each, each.rewards * scale)[1]))
    rows = [[x[age :: len(rows)] for x in each] for age, each in enumerate(rows)]  # so the newest has a row always
    if branches is None:
        batch = Batch(obs, actions, _centre(adv), mu)
    else:
        branch_adv, branch_returns = _advantages(state, branches, branches.rewards * scale)
        batch, later = _vine_batch(state.policy, state.config, branches, branch_adv), branches.real[1:]
        rows.append((branches.obs[1:][later], branch_returns[1:][later]))
    return batch, *(np.concatenate(parts) for parts in zip(*rows, strict=True)), variance, explained


def _max_kl_now(state, adv, variance):
    """max_kl of an update on advantages adv of a rollout whose returns have this variance, and state.powers with both.

    max_kl falls with the steps that are left, so that the policy settles.  Where mean adv^2 and the variance of the
    returns are both below their means so far, it also falls with the one that fell less: the step of E6 is as long for
    noise as for news, and full steps on what is left of the advantages lead away from a solved task again.  Both, as a
    policy that fails at all times alike has small advantages too, once the value function foresees it, but returns that
    vary as before.  With kl_memory 1 the means are plain; with less they are so at first, and then forget.  With
    normalize_reward, both are in units of the returns' deviation so far: where the returns grow, what is as large as
    before counts as smaller.
    """
    config = state.config
    left = max(config.total_steps - state.steps, 1) / config.total_steps if config.kl_schedule == "linear" else 1.0
    keep = min(config.kl_memory, 1 - 1 / (state.updates + 1)) if any(state.powers) else 0.0  # none yet: these are they
    now = float(_mean_over_ranks(np.mean(np.square(adv, dtype=np.float64)), len(adv))), variance
    powers = tuple(new + keep * (old - new) for new, old in zip(now, state.powers, strict=True))
    share = max(new / mean if mean else 0.0 for new, mean in zip(now, powers, strict=True)) or 1.0
    return left * config.max_kl * min(1.0, share), powers


def learn(state, rollout, branches=None, earlier=()):
    """One iteration on a rollout of state's policy: reward statistics, advantages, trpo_update, fit_value.

    earlier: rollouts that the value function is fitted to as well, the oldest first.  With branches, the policy learns
    from these, and the value function also, except from the first row of each branch.  Observation statistics move
    last: rollout and update see one and the same policy.  Returns (TrainState, UpdateInfo, explained variance of the
    value function on the rollout).
    """
    config, real, reward_stats, obs_stats = state.config, rollout.real, state.reward_stats, state.obs_stats
    if config.normalize_reward:
        reward_stats = update_stats(reward_stats, rollout.discounted[real][:, None])
    scale = _inverse_std(reward_stats)[0]
    batch, obs, returns, variance, explained = _targets(state, rollout, branches, earlier, scale)
    max_kl, powers = _max_kl_now(state, batch.adv, variance)
    (theta, info), phi = _both(
        lambda: trpo_update(state.policy, state.theta, batch, config._replace(max_kl=max_kl)),
        lambda: fit_value(state.value, state.phi, obs, returns, config),
    )
    if config.normalize_obs:
        obs_stats = update_stats(obs_stats, rollout.raw_obs[real])
    steps = int(real.sum()) + (int(branches.real.sum()) if branches else 0)
    episodes = _sum_over_ranks(rollout.episodes)
    last_100 = [*zip(state.returns, state.lengths, strict=True), *episodes][-100:]
    state = state._replace(
        theta=theta,
        phi=phi,
        obs_stats=obs_stats,
        reward_stats=reward_stats,
        powers=powers,
        steps=state.steps + _sum_over_ranks(steps),
        updates=state.updates + 1,
        episodes=state.episodes + len(episodes),
        returns=tuple(total for total, _ in last_100),
        lengths=tuple(length for _, length in last_100),
    )
    _check_ranks_agree(f"what update {state.updates} came to", lambda: _arrays(state))
    return state, info, explained


def _vine_plan(envs, policy, config):
    """How often a rollout saves the environments for branches, and the most steps that an update takes."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    if not isinstance(envs, SyncVectorEnv) or envs.metadata["autoreset_mode"] != AutoresetMode.DISABLED:
        raise ValueError(
            "vine sampling restores environments one by one: give it a gym.Env, an id or a callable (but not "
            f"vector='async'), or a SyncVectorEnv with autoreset_mode DISABLED, not {envs}"
        )
    for env in envs.envs:
        _check_restorable(env)
    n_envs = _sum_over_ranks(envs.num_envs)
    n_steps = max(1, config.rollout_steps // n_envs)
    n_saved = min(-(-config.vine_states // n_envs), n_steps)
    return n_saved, n_envs * (n_steps + n_saved * _n_actions(policy, config) * config.vine_steps)


def _interrupt_behind(error, handled):
    """The KeyboardInterrupt that another exception hides, as in compiled code and while compiling; else None.

    handled is what was being handled already when training began.
    """
    seen = [None, handled]
    while error not in seen and not isinstance(error, KeyboardInterrupt):
        seen.append(error)
        error = error.__cause__ or error.__context__
    return error if isinstance(error, KeyboardInterrupt) and error is not handled else None


def _iterate(envs, state, threshold, callback):
    """The loop of train."""
    config, policy, stop, handled = state.config, state.policy, False, sys.exc_info()[1]
    try:
        _check_ranks_agree("state, seed or config", lambda: _arrays(state))
        n_envs = _sum_over_ranks(envs.num_envs)
        n_saved, least = _vine_plan(envs, policy, config) if config.sampling == "vine" else (0, n_envs)
        if least > config.total_steps:
            raise ValueError(f"total_steps must be at least the {least} of one update, got {config.total_steps}")
        rng = np.random.default_rng()
        rng.bit_generator.state = state.rng_state
        if _ranks is not None:  # a stream for each rank; state has that of rank 0
            rng = np.random.Generator(rng.bit_generator.jumped(_ranks.rank))
        runner = None
        earlier = collections.deque(maxlen=int(config.value_rollouts) - 1)
        while not stop and not state.solved and state.steps + least <= config.total_steps:
            n_steps = max(1, min(config.rollout_steps, config.total_steps - state.steps) // n_envs)
            now = envs, policy, state.theta, state.obs_stats
            rollout, runner = collect(*now, runner, rng, n_steps, config.gamma, n_saved)
            if _largest_over_ranks(not rollout.real.any()):
                continue  # it was one step, in which a rank's environments all reset; in the next one they do not
            branches = branch(*now, rollout, rng, config) if n_saved else None
            rng_state = rng.bit_generator.state  # of rank 0, so that any number of ranks can go on from the state
            rng_state = rng_state if _ranks is None else _ranks.bcast(rng_state)
            state, info, explained = learn(state._replace(rng_state=rng_state), rollout, branches, earlier)
            earlier.append(rollout._replace(saved=[]))  # which was for branches
            if threshold is not None and len(state.returns) == 100:
                state = state._replace(solved=bool(np.mean(state.returns) >= threshold))
            stop = _largest_over_ranks(bool(callback and callback(state, info, explained)))
    except BaseException as error:
        error = _interrupt_behind(error, handled) or error
        lost = not error.args if isinstance(error, EOFError) else isinstance(error, ConnectionError) and error.errno
        if lost and hasattr(envs, "processes"):  # what an environment raises comes without a number
            error = RuntimeError("the process of an environment has ended")
        try:
            error.state = state
        except AttributeError:  # of a class that has something else of that name
            error = RuntimeError(f"{type(error).__name__}: {error}")
            error.state = state
        raise error
    return state


def train(env, config=None, *, seed=0, state=None, callback=None):
    """Train a policy: returns the TrainState.

    env: an id, a callable that makes a gym.Env, or one gym.Env or VectorEnv, which then sets the number of
    environments.  state: one to go on from, in new episodes and without earlier rollouts, with its own random numbers
    and, unless given, config; an id that is state.env is made with state.env_args.  callback(state, info, explained
    variance) is called after each update; returning True stops.  Stops before total_steps at the reward threshold that
    the environment is registered with (whatever wrappers make of rewards), if stop_when_solved, and with vine sampling
    where another update might take more steps than are left.  An exception that leaves train, an interrupt as well,
    carries the state after the last finished update as its attribute .state.
    """
    if state is not None:
        _check_state(state)
    config = (state.config if state else Config()) if config is None else config
    check_config(config)
    _check_number("seed", seed, int, "[0, inf)")
    envs, made_here = _make_envs(env, config, **(state.env_args if state and env == state.env else {}))
    with _closing(envs) if made_here else contextlib.nullcontext():
        policy, spec = make_policy(envs.single_observation_space, envs.single_action_space, config.hidden), _spec(envs)
        if state is None:
            first = getattr(envs.unwrapped, "envs", (envs,))[0]
            name, env_args = (spec.id, _env_args(spec)) if spec else (type(first.unwrapped).__name__, {})
            name = env if isinstance(env, str) else name  # with its module: "mine:Maze-v0"
            state = init_state(name, policy, config, seed, env_args)
        elif (policy, config.dtype) != (state.policy, state.theta.dtype):
            raise ValueError(
                f"state is of another network, or {state.env} of other spaces: {state.policy} in {state.theta.dtype}, "
                f"not {policy} in {config.dtype}"
            )
        state = state._replace(config=config, solved=state.solved and config.stop_when_solved)
        threshold = spec.reward_threshold if spec and config.stop_when_solved else None
        return _iterate(envs, state, threshold, callback)


# =============================================================================================== using what was trained
def evaluate(state, env, episodes=20, seed=0):
    """Raw returns and lengths, each (episodes,), of the most likely actions in env: a gym.Env whose episodes end, or an
    id, made with state.env_args if it is state.env.  state is read only: its observation statistics do not move."""
    import gymnasium as gym

    _check_state(state)
    _check_number("episodes", episodes, int, "[1, inf)")
    _check_number("seed", seed, int, "[0, inf)")
    given, env, results = env, _make_env(env, **(state.env_args if env == state.env else {})), []
    with contextlib.nullcontext() if env is given else _closing(env):
        if isinstance(env, gym.vector.VectorEnv):
            raise ValueError("evaluate plays one episode after another: give it an id or a gym.Env, not a VectorEnv")
        if make_policy(env.observation_space, env.action_space, state.policy.sizes[1:-1]) != state.policy:
            raise ValueError(f"the policy was trained on {state.env}, whose spaces differ from those of {env}")
        for episode in range(episodes):
            obs, _ = env.reset(seed=seed if episode == 0 else None)
            total, length, ended = 0.0, 0, False
            while not ended:
                action = state.act(gym.spaces.flatten(env.observation_space, obs))
                obs, reward, terminated, truncated, _ = env.step(action)
                total, length, ended = total + float(reward), length + 1, terminated or truncated
            results.append((total, length))
    return np.array([total for total, _ in results]), np.array([length for _, length in results])


@contextlib.contextmanager
def _replacing(path):
    """A file that takes the place of path at the end of the block, at once: path never holds half of anything."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a name that the user knows
    finally:
        part.unlink(missing_ok=True)


def _arrays(state):
    """All of state as arrays by name, the rest of it as one text."""
    plain = state._asdict()
    arrays = {"theta": plain.pop("theta"), "phi": plain.pop("phi")}
    for name in ("obs_stats", "reward_stats"):
        arrays |= {f"{name}.{field}": np.asarray(value) for field, value in plain.pop(name)._asdict().items()}
    plain |= {name: plain[name]._asdict() for name in ("config", "policy", "value")}
    text = json.dumps(plain, default=lambda number: number.item())
    return arrays | {"state": np.asarray(text)}


def _checkpoint(path):
    """The file that a path names, or that is in the folder it names."""
    path = Path(path)
    return path / "checkpoint.npz" if path.is_dir() else path


def _run_folder(path):
    """The folder of a run, by its own name or that of the checkpoint in it."""
    return path.parent if path.name == "checkpoint.npz" and path.is_file() else path


def save(state, path):
    """Write state to the file path, or to path/checkpoint.npz if path is a folder, atomically: arrays and text only,
    and a digest that load checks."""
    arrays = _arrays(state)
    with _replacing(_checkpoint(path)) as file:
        np.savez(file, **arrays, digest=_digest(arrays))


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def load(path):
    """The TrainState that save wrote to path.  OSError where that cannot be read, ValueError where it is anything
    else."""
    path = _checkpoint(path)
    content = path.read_bytes()
    try:
        if not content.startswith(b"PK\x03\x04"):  # of which NumPy would say that it may be unsafe
            raise ValueError("it is not an .npz file")
        arrays = dict(np.load(io.BytesIO(content), allow_pickle=False))
        if str(arrays.pop("digest")) != _digest(arrays):
            raise ValueError("it was changed after it was written")
        plain = json.loads(str(arrays.pop("state")))
        for name in ("obs_stats", "reward_stats"):
            count, mean, m2 = (arrays[f"{name}.{field}"] for field in RunningStats._fields)
            plain[name] = RunningStats(float(count), _finite("mean", mean, (None,)), _finite("m2", m2, mean.shape))
        if lacks := {*TrainState._fields} - {*plain, "theta", "phi", "powers"}:  # powers came later than the others
            raise ValueError(f"it lacks {', '.join(sorted(lacks))}")
        plain["config"].setdefault("precondition", False)  # as it was before there was a choice, with its cg_iters
        if differ := {*plain["config"], *plain, "theta", "phi"} ^ {*Config._fields, *TrainState._fields}:
            text = f"{path} is of another version, with other fields: {', '.join(sorted(differ))}"
            warnings.warn(text, stacklevel=1)  # from here, so that a resume, which loads twice, says it once
        plain["config"] = {name: value for name, value in plain["config"].items() if name in Config._fields}
        for name, kind in (("config", Config), ("policy", Policy), ("value", Policy)):
            plain[name] = kind(**{field: _tuple(value) for field, value in plain[name].items()})
        plain = {name: _tuple(value) for name, value in plain.items() if name in TrainState._fields}
        check_config(plain["config"])
        if len(plain["obs_stats"].mean) != plain["policy"].sizes[0]:
            raise ValueError("its parts do not fit together")
        for name, net in (("theta", plain["policy"]), ("phi", plain["value"])):
            _check_policy(net)
            plain[name] = _finite(name, arrays[name], (n_params(net),))
        return TrainState(**plain)
    except Exception as error:  # a damaged file fails in more ways than could be listed
        raise ValueError(f"{path} is not a checkpoint of trpo_min {__version__}: {error}") from error


# ======================================================================================================= a run's folder
# config.json: how to repeat the run, for the reader.  progress.csv: a row an update.  checkpoint.npz: the state after
# the last finished update, and all that resuming needs.
def progress_row(state, info, explained, steps_per_second, seconds):
    """What progress.csv says of an update: returns and lengths over the last 100 episodes, KL and entropy in nats."""
    returns, lengths = state.returns or (np.nan,), state.lengths or (np.nan,)
    return {
        "update": state.updates,
        "steps": state.steps,
        "episodes": state.episodes,
        "return_mean": float(np.mean(returns)),
        "return_min": min(returns),
        "return_max": max(returns),
        "length_mean": float(np.mean(lengths)),
        "kl_mean": info.kl,
        "kl_max": info.kl_largest,
        "surrogate_gain": info.surrogate - info.surrogate_old,
        "step_length": info.step_length,
        "backtracks": info.backtracks,
        "cg_iters": info.cg_iters,
        "cg_residual": info.cg_residual,
        "entropy": info.entropy,
        "explained_variance": explained,
        "steps_per_second": round(steps_per_second, 1),
        "seconds": round(seconds, 3),
    }


def read_progress(out):
    """The rows of a run's progress.csv as numbers."""
    path = out / "progress.csv"
    try:
        lines = path.read_text().split("\n")[:-1]  # at once, and whole lines: a run may be writing more, or was killed
        table = csv.DictReader(lines)
        if lines and not {"update", "return_mean", "seconds"} <= set(table.fieldnames or ()):
            raise ValueError("its first line does not name the columns")
        return [{name: float(value) for name, value in row.items()} for row in table]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not what trpo_min wrote: {error}") from error


def _add_progress(out, row):
    with open(out / "progress.csv", "a+", newline="") as file:
        file.seek(0)
        names = next(csv.reader(file), None)  # of another version there may be others
        writer = csv.DictWriter(file, names or row, "nan", "ignore", lineterminator="\n")
        if names is None:
            writer.writeheader()
        writer.writerow(row)


def _write_config(out, state):
    import gymnasium

    versions = {module.__name__: module.__version__ for module in (np, numba, scipy, gymnasium)}
    versions |= {"trpo_min": __version__, "python": sys.version.split()[0]}
    record = {"env": state.env, "env_args": state.env_args, "seed": state.seed, "config": state.config._asdict()}
    record |= {"ranks": 1 if _ranks is None else _ranks.size, "resumed_after_steps": state.steps}
    with _replacing(out / "config.json") as file:
        file.write(json.dumps(record | {"versions": versions}, indent=2).encode() + b"\n")


def _lock(out, stack):
    """ValueError if another process has the run (where there are locks: not on Windows); else removes what one left
    that was killed while it wrote."""
    (out / "progress.csv").touch()
    file = stack.enter_context(open(out / "progress.csv", "rb"))  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out} is in use by another process") from error
    except (ImportError, OSError):
        pass
    for part in out.glob("*.[0-9]*.tmp"):
        part.unlink()


def _start_folder(out, state, stack):
    """Makes a run's folder, and has it locked; ValueError if it holds anything already, except what a process leaves
    that is killed in here."""
    out.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in out.iterdir() if not path.match("*.[0-9]*.tmp")}
    if names - {"progress.csv"} or (names and (out / "progress.csv").stat().st_size):
        resume = f", or --resume {out}" if (out / "checkpoint.npz").exists() else ""
        raise ValueError(f"{out} is not empty, and is not overwritten: choose another --out{resume}")
    _lock(out, stack)
    if (out / "checkpoint.npz").exists():  # another process was faster
        raise ValueError(f"{out} is in use by another process")
    save(state, out / "checkpoint.npz")
    _write_config(out, state)


def _cut_progress(out, updates):
    """Cuts off the rows after so many updates, which a process wrote that was killed before the checkpoint."""
    path = out / "progress.csv"
    lines = path.read_bytes().splitlines(keepends=True)
    for n, line in enumerate(lines):
        number = line.split(b",")[0]
        if not line.endswith(b"\n") or (number.isdigit() and int(number) > updates):
            os.truncate(path, sum(map(len, lines[:n])))
            return


def _rescue(state, out):
    """Saves state in out, or else in a new folder here, among the temporary files, or at home; returns where."""
    for base in (None, Path(), tempfile.gettempdir(), Path.home()):
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"{out.resolve().name}-", dir=base)) if base else out
        except OSError:
            continue
        try:
            save(state, folder / "checkpoint.npz")
            return folder
        except OSError:
            if base:
                folder.rmdir()
    return "no folder, as none can be written to"


@contextlib.contextmanager
def _needs(module, extra):
    """Where an import in the block fails, says how to get what it needs."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"this needs {module}: pip install {module}, or the extra {extra} of trpo-min") from error


def _curve(runs):
    """steps, return, low, high: of one run its smallest and largest return; of several the 95% interval of the mean,
    for the steps that all of them took."""
    from scipy.special import stdtrit

    names = "steps", "return_mean", "return_min", "return_max"
    columns = [np.array([[row[name] for name in names] for row in run]).T for run in runs]
    if len(runs) == 1:
        return columns[0]
    steps = np.linspace(max(each[0, 0] for each in columns), min(each[0, -1] for each in columns), 200)
    if steps[0] > steps[-1]:
        raise ValueError("runs of the same settings have no steps in common: plot them one by one")
    means = np.stack([np.interp(steps, each[0], each[1]) for each in columns])
    half = stdtrit(len(runs) - 1, 0.975) * means.std(axis=0, ddof=1) / np.sqrt(len(runs))
    return steps, means.mean(axis=0), means.mean(axis=0) - half, means.mean(axis=0) + half


def plot(folders, path):
    """Learning curves of runs' folders: a panel for each environment, in it a curve for each Config."""
    path = Path(path)
    with _needs("matplotlib", "plot"):
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    kind, kinds = path.suffix[1:] or "png", FigureCanvasBase.get_supported_filetypes()
    if kind not in kinds:
        raise ValueError(f"cannot draw to {path}: its name must end in one of {', '.join(sorted(kinds))}")
    panels = {}
    for folder in dict.fromkeys(_run_folder(Path(each)).resolve() for each in folders):
        state, rows = load(folder), [row for row in read_progress(folder) if np.isfinite(row["return_mean"])]
        if not rows:
            warnings.warn(f"{folder} has no finished episode to plot", stacklevel=1)
            continue
        title = state.env + (f" {json.dumps(state.env_args)}" if state.env_args else "")
        same = {} if state.config.kl_schedule == "linear" else {"total_steps": 0}  # or it sets max_kl
        settings = frozenset(state.config._replace(**same)._asdict().items())
        panels.setdefault(title, {}).setdefault(settings, []).append(rows)
    if not panels:
        raise ValueError("there is no run with a finished episode to plot")
    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for settings, runs in curves.items():
            steps, mean, low, high = _curve(runs)
            differs = ", ".join(f"{name} {value}" for name, value in sorted(settings - frozenset.intersection(*curves)))
            band = f"{len(runs)} runs, mean and 95% interval" if len(runs) > 1 else "1 run, mean, smallest and largest"
            marker = "" if len(steps) > 1 else "o"
            (line,) = axis.plot(steps, mean, marker=marker, label=f"{differs}: {band}" if differs else band)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axis.set(title=title, xlabel="environment steps", ylabel="return of the last 100 episodes")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.grid(alpha=0.3)
        axis.legend()
    if path.is_dir():
        raise ValueError(f"cannot draw to {path}, a folder: give the name of a file")
    with _replacing(path) as file:
        figure.savefig(file, format=kind, dpi=150)


# ========================================================================================================= command line
EXAMPLES = """Trust Region Policy Optimization on NumPy, Numba and Gymnasium.

  trpo_min.py --env CartPole-v1                         train, and save in runs/
  trpo_min.py --env Ant-v5 --seed 1 --out ant           choose a seed and a folder
  trpo_min.py --env mine:Maze-v0 --env-args '{"size": 5}'   of mine.py
  trpo_min.py --resume ant                              go on after Ctrl-C or a crash
  trpo_min.py --eval ant --episodes 20 --video videos   play it, and record it
  trpo_min.py --plot runs/CartPole-v1-*                 learning curves as a PNG
"""
_MODES = {  # and the options of each, besides --quiet and --debug
    "env": {"env_args", "seed", "out", "tensorboard", *Config._fields},
    "resume": {"total_steps", "stop_when_solved", "tensorboard"},
    "eval": {"env_args", "seed", "episodes", "render", "video"},
    "plot": {"out"},
}
_GROUPS = {  # the first setting of each group
    "hidden": "networks",
    "total_steps": "environment",
    "gamma": "advantages",
    "max_kl": "policy update (the value function has the same conjugate gradients and backtracking)",
    "value_rollouts": "value function",
}


def integer(text):
    """int(text), and 1e6 too; argparse puts the name of this function into its message."""
    return int(float(text)) if "e" in text.lower() and float(text).is_integer() else int(text)


def json_object(text):
    """A dict out of JSON."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise argparse.ArgumentTypeError(f"must be a JSON object such as '{{\"size\": 5}}', got {text}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """One sentence on standard error, with the nearest option for a mistyped one; exit code 2."""
        for word in (w.split("=")[0] for w in message.split() if w.startswith("--")):
            near = difflib.get_close_matches(word, self._option_string_actions, 1, 0.7)
            if message.startswith("unrecognized") and near:
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"trpo_min: {' '.join(message.split())}\n")


def _add_setting(group, name):
    """The option of a field of Config."""
    hint, default = _FIELDS[name], getattr(Config(), name)
    kind, (interval, text) = hint.__origin__, hint.__metadata__
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    if kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    else:
        kinds = {float: (float, "X"), str: (str, interval.replace(" ", "|"))}
        options = dict(zip(("type", "metavar"), kinds.get(kind, (integer, "N")), strict=True))
        options |= {"nargs": "+"} if isinstance(default, tuple) else {}
    group.add_argument("--" + name.replace("_", "-"), help=f"{text} (default: {shown})", **options)


def _parser():
    parser = _Parser(
        prog="trpo_min",
        usage="trpo_min.py (--env ID | --resume DIR | --eval DIR | --plot DIR [DIR ...]) [options]",
        description=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    modes = parser.add_argument_group("what to do").add_mutually_exclusive_group(required=True)
    modes.add_argument("--env", metavar="ID", help="train on a Gymnasium environment: CartPole-v1, or module:Name-v0")
    modes.add_argument("--resume", type=Path, metavar="DIR", help="go on with a run, from its last finished update")
    modes.add_argument("--eval", type=Path, metavar="DIR", help="play the most likely actions of a trained policy")
    modes.add_argument("--plot", type=Path, nargs="+", metavar="DIR", help="draw the learning curves of runs")
    run = parser.add_argument_group("the run")
    run.add_argument("--env-args", type=json_object, metavar="JSON", help="arguments of the environment (default: {})")
    run.add_argument("--seed", type=integer, metavar="N", help="of everything random (default: 0)")
    out = "folder of the run, or file of the plot (default: runs/<env>-<time>-seed<N>, learning_curves.png)"
    run.add_argument("--out", type=Path, metavar="PATH", help=out)
    run.add_argument("--tensorboard", action="store_true", help="write event files for TensorBoard too")
    run.add_argument("--quiet", action="store_true", default=False, help="print the result only")
    run.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
    play = parser.add_argument_group("with --eval")
    play.add_argument("--episodes", type=integer, metavar="N", help="episodes to play (default: 20)")
    shown = play.add_mutually_exclusive_group()
    shown.add_argument("--render", action="store_true", help="show them in a window")
    shown.add_argument("--video", type=Path, metavar="DIR", help="record them as MP4")
    for name in Config._fields:
        if name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[name])
        _add_setting(group, name)
    return parser


def _parse(argv):
    """(what to do, the options that were given); exit code 2 where they do not go together."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    (mode,) = _MODES.keys() & given.keys()
    for name in sorted(given.keys() - _MODES[mode] - {mode, "quiet", "debug"}):
        why = ", which keeps the settings of the run" if mode == "resume" else ""
        parser.error(f"--{name.replace('_', '-')} does not go with --{mode}{why}")
    for name, least in (("seed", 0), ("episodes", 1)):
        if given.get(name, least) < least:
            parser.error(f"--{name} must be at least {least}, got {given[name]}")
    return mode, given


def _describe(space):
    return f"Box{space.shape}" if type(space).__name__ == "Box" else str(space)


def _header(envs, state, given):
    ranks = f"{_ranks.size} ranks of " if _ranks is not None else ""
    policy_sizes, value_sizes = ("-".join(map(str, net.sizes)) for net in (state.policy, state.value))
    return (
        f"{state.env}: observations {_describe(envs.single_observation_space)}, "
        f"actions {_describe(envs.single_action_space)}\n"
        f"policy {policy_sizes} ({state.policy.head}, {n_params(state.policy):,} parameters), value {value_sizes}\n"
        f"at most {state.config.total_steps:,} steps in {ranks}{envs.num_envs} environments, {state.config.sampling}, "
        f"{state.config.dtype}, "
        + (f"resumed after {state.steps:,} steps" if "resume" in given else f"seed {state.seed}")
    )


def _say(text):
    """Print; a reader who has gone, a full disk behind the output, or one without these letters ends no training."""
    try:
        print(text, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _say_row(row):
    _say(
        "{steps:9,}  return {return_mean:7.5g}  KL {kl_mean:7.2g} max {kl_max:7.2g}  entropy {entropy:5.2f}  "
        "EV {explained_variance:4.0%}  {steps_per_second:6,.0f}/s".format(**row)
    )


def _progress(state, stack):
    """report(row), called after each update: a progress bar on a terminal, else a line."""
    if _ranks is not None or not (sys.stdout and sys.stdout.isatty()):  # mpirun has a terminal of its own for rank 0
        return _say_row
    try:
        from tqdm import tqdm
    except ImportError:
        _say("(for a progress bar: pip install tqdm, or the extra progress of trpo-min)")
        return _say_row
    bars = []

    def report(row):
        if not bars:  # not before, so that the notice of compiling comes first
            options = {"total": state.config.total_steps, "initial": state.steps, "unit": "step", "unit_scale": True}
            bars.append(stack.enter_context(tqdm(**options)))
        bars[0].set_postfix_str("return {return_mean:.5g}, KL {kl_mean:.2g}".format(**row), refresh=False)
        bars[0].update(row["steps"] - bars[0].n)

    return report


def _tensorboard(out, state, stack):
    """report(row) for TensorBoard."""
    with _needs("tensorboardX", "tensorboard"):
        from tensorboardX import SummaryWriter
    writer = stack.enter_context(SummaryWriter(str(out), purge_step=state.steps + 1))

    def report(row):
        for name, value in row.items():
            writer.add_scalar(name, value, int(row["steps"]))

    return report


def _compile_notice():
    """Says once that Numba is compiling, when it is: not when the kernels come from its cache."""
    from numba.core import event

    class Notice(event.Listener):
        said = False

        def on_start(self, _):
            if not self.said:
                _say("compiling (once: the machine code is cached for later runs) ...")
            self.said = True

        def on_end(self, _):
            pass

    return event.install_listener("numba:compile", Notice())


@contextlib.contextmanager
def _signals_noted():
    """A list that SIGINT and SIGTERM are appended to instead of raising: an exception in compiled code can get lost.

    The second one does raise KeyboardInterrupt.  The handlers are put back at the end.
    """
    received = []

    def note(number, _):
        received.append(number)
        if not _launched()[0]:  # of several ranks the first says it
            with contextlib.suppress(OSError):
                os.write(2, b"\ntrpo_min: stopping after the update in progress; at a second signal, at once\n")
        for each in handlers:
            signal.signal(each, signal.default_int_handler)

    main_thread = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main_thread}
    handlers = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _signalled(signals):
    """Whether this or another rank was signalled, of which all then know."""
    number = _largest_over_ranks(signals[0] if signals else 0)
    if number and not signals:
        signals.append(number)
    return bool(number)


def _recorder(out, start, reports, signals):
    """A callback for train: each update is saved in out and reported; it stops at a signal."""
    rows = read_progress(out)
    begin, last = time.perf_counter() - (rows[-1]["seconds"] if rows else 0.0), [time.perf_counter(), start.steps]

    def callback(state, info, explained):
        now = time.perf_counter()
        row = progress_row(state, info, explained, (state.steps - last[1]) / (now - last[0]), now - begin)
        last[:] = now, state.steps
        if state.updates == start.updates + 1:
            _write_config(out, start)
        _add_progress(out, row)  # first: resuming drops a row that checkpoint.npz does not know of
        save(state, out / "checkpoint.npz")
        for report in reports:
            report(row)
        return _signalled(signals)

    return callback


def _new_run(given, settings, stack):
    """The environments, the TrainState to start from, and its folder, of --env."""
    config, name, env_args, seed = Config(**settings), given["env"], given.get("env_args", {}), given.get("seed", 0)
    check_config(config)
    envs = stack.enter_context(_closing(_make_envs(name, config, **env_args)[0]))
    policy = make_policy(envs.single_observation_space, envs.single_action_space, config.hidden)
    start, now = init_state(name, policy, config, seed, env_args), datetime.datetime.now()
    run = f"{name.replace('/', '-').replace(':', '-')}-{now:%Y%m%d-%H%M%S.%f}-seed{seed}"
    out = given.get("out", Path("runs") / run)
    _start_folder(out, start, stack)
    return envs, start, out


def _old_run(given, settings, stack):
    """The same of --resume."""
    out = _run_folder(given["resume"])
    if not out.is_dir():
        raise ValueError(f"{out} is not the folder of a run")
    start = load(out)
    envs = stack.enter_context(_closing(_make_envs(start.env, start.config, **start.env_args)[0]))
    _lock(out, stack)  # after their processes have started, which would hold it longer than this one
    start = load(out)  # again, as another process may have had it until now
    start = start._replace(config=start.config._replace(**settings))
    check_config(start.config)
    _cut_progress(out, start.updates)
    return envs, start, out


def _save_what_there_is(state, start, out, given, existed):
    """After an error: where the state is, in words.  Of a new run without an update nothing stays, but out, if it
    existed."""
    if state.updates > start.updates:
        return f"; the state after {state.steps:,} steps is saved in {_rescue(state, out)}"
    if "resume" not in given:
        with contextlib.suppress(OSError):
            for path in (*out.glob("events.*"), *(out / name for name in ("config.json", "progress.csv"))):
                path.unlink(missing_ok=True)
            (out / "checkpoint.npz").unlink(missing_ok=True)
            if not existed:
                out.rmdir()
            if out.parent == Path("runs"):
                out.parent.rmdir()  # if it is empty
    return ""


def _run_train(given):
    begin, existed = time.perf_counter(), "out" in given and given["out"].exists()
    settings = {name: _tuple(value) for name, value in given.items() if name in _FIELDS}
    with contextlib.ExitStack() as stack, _signals_noted() as signals:
        envs, start, out = (_old_run if "resume" in given else _new_run)(given, settings, stack)
        if _ranks is not None:
            _ranks.bcast((start, out))  # to _run_other_rank
        try:
            with contextlib.ExitStack() as shown:
                reports = [_tensorboard(out, start, shown)] if given.get("tensorboard") else []
                if not given["quiet"]:
                    _say(_header(envs, start, given))
                    reports.append(_progress(start, shown))
                    shown.enter_context(_compile_notice())
                state = train(envs, start.config, state=start, callback=_recorder(out, start, reports, signals))
            if state.updates == start.updates and not signals:
                more = "--no-stop-when-solved" if state.solved else "a larger --total-steps"
                raise ValueError(f"no update is left to do after {start.steps:,} steps: to go on, give {more}")
        except BaseException as error:
            error.fate = _save_what_there_is(getattr(error, "state", start), start, out, given, existed)
            if signals:  # which may have ended a process of the environments too, or the compiler
                error.signal = signals[0]
            raise
        n = len(state.returns)
        _say(
            f"{'solved' if state.solved else 'stopped' if signals else 'trained'} {state.env}: "
            + (f"mean return {np.mean(state.returns):.5g} over the last {n} episodes" if n else "no episode ended")
            + f", after {state.steps:,} steps in {time.perf_counter() - begin:.1f} s; saved in {out}"
        )
    return 128 + signals[0] if signals else 0


def _run_other_rank():
    """What the ranks but the first do of _run_train: they train on the state that rank 0 sends, and write nothing."""
    with _signals_noted() as signals:
        start, out = _ranks.bcast(None)
        try:
            with _closing(_make_envs(start.env, start.config, **start.env_args)[0]) as envs:
                train(envs, start.config, state=start, callback=lambda *_: _signalled(signals))
        except BaseException as error:
            done = getattr(error, "state", start).steps
            error.fate = f"; {out} holds the state after {done:,} steps"
            raise
    return 128 + signals[0] if signals else 0


def _run_eval(given):
    import gymnasium as gym

    state, video = load(given["eval"]), given.get("video")
    mode = {"render_mode": "human"} if "render" in given else {"render_mode": "rgb_array"} if video else {}
    if video:
        with _needs("moviepy", "video"):
            import moviepy  # noqa: F401
    env = _make_env(state.env, **state.env_args | given.get("env_args", {}) | mode)
    if video:
        if "rgb_array" not in env.metadata.get("render_modes", ()):
            raise ValueError(f"{state.env} cannot be recorded: it has no render mode rgb_array")
        env = gym.wrappers.RecordVideo(env, str(video), episode_trigger=lambda _: True)
    with _closing(env):
        returns, lengths = evaluate(state, env, given.get("episodes", 20), given.get("seed", 0))
    _say(
        f"{state.env}, {len(returns)} episodes: return {returns.mean():.1f} +- {returns.std():.1f}, "
        f"from {returns.min():.1f} to {returns.max():.1f}; length {lengths.mean():.1f}, "
        f"from {lengths.min()} to {lengths.max()}" + (f"; recorded in {video}" if video else "")
    )
    return 0


def _run_plot(given):
    path = given.get("out", Path("learning_curves.png"))
    plot(given["plot"], path)
    _say(f"drawn in {path}")
    return 0


def _launched():
    """(rank, number of ranks) as mpirun or another launcher of MPI tells this process; (0, 1) without one."""
    for kind in ("OMPI_COMM_WORLD", "PMI"):  # Open MPI; MPICH and its descendants
        if f"{kind}_SIZE" in os.environ:
            return int(os.environ.get(f"{kind}_RANK", 0)), int(os.environ[f"{kind}_SIZE"])
    return 0, 1


def _world(n_ranks):
    """The communicator of all ranks; None for one."""
    if n_ranks == 1:
        return None
    with _needs("mpi4py", "mpi"):
        from mpi4py import MPI
    if MPI.COMM_WORLD.size != n_ranks:
        raise ValueError(
            f"by its environment this is one of {n_ranks} ranks, but mpi4py sees {MPI.COMM_WORLD.size}: is mpirun of "
            "another MPI, or was a rank's environment inherited?"
        )
    return MPI.COMM_WORLD


def _report(error, debug, rank):
    """One sentence about an exception on standard error; the exit code."""
    if debug:
        traceback.print_exc()
    expected = isinstance(error, (ValueError, OSError)) and str(error)
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = isinstance(error, OSError) or frames[-1:] == [_report.__code__.co_filename]
    what = str(error) if expected and ours else f"{type(error).__name__}: {error} (--debug shows where)"
    code = 2 if expected else 1
    if number := getattr(error, "signal", signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0):
        what, code = "interrupted", 128 + number
    where = f"rank {rank}: " if rank else ""
    print(f"trpo_min: {where}{' '.join(what.split())}{getattr(error, 'fate', '')}", file=sys.stderr, flush=True)
    return code


def main(argv=None):
    """The command line: returns the exit code.  Of several ranks, the first does all that is not training."""
    (rank, n_ranks), comm = _launched(), None
    with contextlib.ExitStack() as stack:
        if rank:  # what it would say, rank 0 says
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            mode, given = _parse(argv)
        except SystemExit as misuse:
            raise SystemExit(0 if rank else misuse.code) from None  # a code from this rank could end rank 0 too soon
        if "" not in sys.path:
            sys.path.append("")  # module:Name-v0 may be a file here
        if argv is None:
            gc.freeze()  # at its end the process would search all that it imported for cycles, for 0.1 s
        try:
            if mode in ("eval", "plot"):
                return 0 if rank else {"eval": _run_eval, "plot": _run_plot}[mode](given)
            comm = _world(n_ranks)
            if comm is not None and "NUMBA_NUM_THREADS" not in os.environ:
                numba.config.NUMBA_NUM_THREADS = 1  # a core for each rank
            with data_parallel(comm):
                return _run_other_rank() if rank else _run_train(given)
        except BaseException as error:
            if rank and comm is not None:
                sys.stderr = sys.__stderr__
                time.sleep(1)  # where rank 0 has failed by itself too, it says so, and ends this one
            code = _report(error, given["debug"], rank)
            if comm is not None:  # the others wait for this rank
                time.sleep(0.5)  # Open MPI may lose what was printed less than that before
                comm.Abort(code)
            return code


if __name__ == "__main__":
    sys.exit(main())
