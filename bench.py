"""Every number that the README shows, each by one sub-command.

    OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=2 python bench.py update             speed, on two threads
    OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 taskset -c 0 python bench.py update      the same on one
    OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python bench.py learn --plot             learning, by two processes

Each sub-command checks first that what it compares gives the same numbers.  Times are medians of --repeats calls in
this process, with the spread from the first to the third quartile.  `pip install ".[bench,mujoco,envpool]"` has all
it needs, the programs that it compares with included.
"""

import argparse
import ast
import atexit
import contextlib
import copy
import csv
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import tracemalloc
import unittest.mock
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import gymnasium as gym
import numba
import numpy as np
import scipy
import scipy.stats

import trpo_min as tm

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def machine():
    """One line: processor, threads, versions, date."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    blas = os.environ.get("OPENBLAS_NUM_THREADS", "not set")
    return (
        f"{name}, {os.cpu_count()} cores; threads {threads()}, BLAS threads {blas}; "
        f"Python {platform.python_version()}, NumPy {np.__version__}, Numba {numba.__version__}, "
        f"SciPy {scipy.__version__}; {time.strftime('%Y-%m-%d')}"
    )


def threads():
    return numba.config.NUMBA_NUM_THREADS


def timed(function, repeats, prepare=lambda: None):
    """Median and quartiles of the seconds that function takes, each time after prepare."""
    seconds = []
    for _ in range(repeats):
        prepare()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return np.percentile(seconds, [50, 25, 75])


def rested(function, repeats):
    """timed, after a pause: for some milliseconds after a product, NumPy's BLAS threads keep a core busy waiting."""
    time.sleep(0.5)
    function()
    return timed(function, repeats)


def milliseconds(quantiles):
    return f"{quantiles[0] * 1e3:9.3f} ({quantiles[1] * 1e3:.3f}-{quantiles[2] * 1e3:.3f})"


def record(name, header, rows, args):
    """results/name.csv: these rows in place of those with the same number of threads; not from a --quick run."""
    path = RESULTS / f"{name}.csv"
    if not args.quick:
        others = [row for row in read_csv(path) if row["threads"] != str(threads())] if path.exists() else []
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header.split(","))
            writer.writerows(sorted([*(list(row.values()) for row in others), *rows], key=lambda row: int(row[0])))


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scratch():
    """An empty folder that is deleted when this process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:grey")


def figures(*shape, **options):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*shape, layout="constrained", **options)


# ======================================================================================== the Fisher-vector product
def layers(policy, theta):
    at = 0
    for m, n in zip(policy.sizes, policy.sizes[1:], strict=False):
        yield theta[at : at + m * n].reshape(m, n), theta[at + m * n : at + m * n + n]
        at += (m + 1) * n


def numpy_activations(policy, theta, obs):
    acts = [obs]
    weights = list(layers(policy, theta))
    for i, (W, b) in enumerate(weights):
        z = acts[-1] @ W + b
        acts.append(np.tanh(z) if i < len(weights) - 1 else z)
    return acts


def numpy_fvp(policy, theta, acts, v):
    """F v of a Gaussian head on whole-batch arrays: what a careful NumPy program would do."""
    weights, moves = list(layers(policy, theta)), list(layers(policy, v))
    n_rows, last, dh = len(acts[0]), len(weights) - 1, None
    for i, ((W, _), (dW, db)) in enumerate(zip(weights, moves, strict=True)):
        dz = acts[i] @ dW + db + (0 if dh is None else dh @ W)
        dh = dz * (1 - acts[i + 1] ** 2) if i < last else dz
    log_std = theta[-policy.sizes[-1] :]
    u, out = dh * np.exp(-2 * log_std) / n_rows, [2 * v[-policy.sizes[-1] :]]
    for i in range(last, -1, -1):
        out += [u.sum(axis=0), (acts[i].T @ u).ravel()]
        u = (u @ weights[i][0].T) * (1 - acts[i] ** 2) if i else None
    return np.concatenate(out[::-1])


def score_rows(policy, theta, acts, actions):
    """The score of every row (N, P): what the empirical form stores."""
    weights, n = list(layers(policy, theta)), policy.sizes[-1]
    log_std = theta[-n:]
    z = (actions - acts[-1]) * np.exp(-log_std)
    u, parts = z * np.exp(-log_std), [z * z - 1]
    for i in range(len(weights) - 1, -1, -1):
        parts += [u, (acts[i][:, :, None] * u[:, None, :]).reshape(len(u), -1)]
        u = (u @ weights[i][0].T) * (1 - acts[i] ** 2)
    return np.concatenate(parts[::-1], axis=1)


def dense_fisher(policy, theta, obs):
    """F (P, P), a column a product."""
    return np.stack([tm.fvp(policy, theta, obs, e) for e in np.eye(len(theta))], axis=1)


def fisher_case(sizes, n_rows, dtype):
    rng, policy = np.random.default_rng(0), tm.Policy(sizes, "gaussian")
    theta = tm.init_params(policy, rng, dtype)
    theta += 0.1 * rng.standard_normal(len(theta)).astype(dtype)
    obs, v = rng.standard_normal((n_rows, sizes[0])).astype(dtype), rng.standard_normal(len(theta)).astype(dtype)
    return policy, theta, obs, v, rng


def kernel(policy, theta, obs):
    """F v alone on cached activations, to be called as inside conjugate gradients, with one thread of BLAS."""
    acts = tm._activations(theta, np.array(policy.sizes), obs)
    sizes, acts, m, nvec = tm._fisher(policy, acts, tm._outputs(policy, theta, acts))
    jac = tm._jac(theta, sizes, acts, CONFIG.cg_iters)
    return lambda v: tm._fvp(theta, v, sizes, acts, jac, m, nvec, 0.0)


def fvp(args):
    """Parity, then the rate of F v against that of the machine's own matrix product, and whole-batch NumPy."""
    print(machine())
    policy, theta, obs, v, rng = fisher_case((4, 8, 2), 200, np.float64)
    exact = tm.fvp(policy, theta, obs, v)
    acts = numpy_activations(policy, theta, obs)
    print("\nparity, largest relative difference from F v on 4-8-2, 200 rows:")
    print(f"  whole-batch NumPy {np.abs(numpy_fvp(policy, theta, acts, v) - exact).max() / np.abs(exact).max():.1e}")
    print(f"  dense matrix      {np.abs(dense_fisher(policy, theta, obs) @ v - exact).max() / np.abs(exact).max():.1e}")
    many = np.repeat(obs, 500, axis=0)
    acts = numpy_activations(policy, theta, many)
    S = score_rows(policy, theta, acts, tm.sample(policy, tm.forward(policy, theta, many), rng))
    error = np.abs(S.T @ (S @ v) / len(many) - exact).max() / np.abs(exact).max()
    print(f"  empirical form    {error:.1e} from 500 actions a state: it is an estimate, 1/sqrt(actions)")

    print("\nF v, and a product N x H by H x H on all threads, median of milliseconds (quartiles)")
    print("operations are counted with four products between hidden layers; up to four outputs spare two of them")
    print("network        rows  type     ours                       GFLOP/s  of the product's  over whole-batch NumPy")
    rows = []
    for sizes in ((11, 64, 64, 3), (17, 256, 256, 6)):
        for n_rows in (2048,) if args.quick else (2048, 16384, 50000):
            for dtype in (np.float64, np.float32):
                policy, theta, obs, v, rng = fisher_case(sizes, n_rows, dtype)
                (D, H, _, A), shown = sizes, "-".join(map(str, sizes))
                product, acts = kernel(policy, theta, obs), numpy_activations(policy, theta, obs)
                square, out = rng.standard_normal((H, H)).astype(dtype), np.empty((n_rows, H), dtype)
                repeats = max(5, min(args.repeats, int(1e7 / n_rows / H)))
                with tm._one_blas_thread():
                    mine = rested(lambda f=product, v=v: f(v), repeats)
                gemm = rested(lambda a=acts[1], b=square, c=out: np.dot(a, b, c), repeats)
                whole = rested(lambda p=policy, t=theta, a=acts, v=v: numpy_fvp(p, t, a, v), repeats)
                flop = 2 * n_rows * (2 * D * H + 4 * H * H + 4 * H * A)
                rate, best = flop / mine[0] / 1e9, 2 * n_rows * H * H / gemm[0] / 1e9
                print(
                    f"{shown:13} {n_rows:5} {np.dtype(dtype).name} {milliseconds(mine):28} {rate:6.1f}  "
                    f"{rate / best:6.2f} of {best:5.1f}  {whole[0] / mine[0]:9.2f}x",
                    flush=True,
                )
                rows.append([threads(), shown, n_rows, np.dtype(dtype).name, *mine, rate, best, whole[0]])
    record("fvp", "threads,network,rows,dtype,median,q1,q3,GFLOP/s,product GFLOP/s,NumPy", rows, args)


# ====================================================================================== the whole update, and its peers
DAMPING = 0.1  # c in (F + c I), which Tianshou does not let one choose
CONFIG = tm.Config(damping=3 * DAMPING, cg_iters=10, cg_tol=0.0, precondition=False)  # as the peers, where sigma is 1


def gaussian_batch(sizes, n_rows, dtype):
    """A policy, its parameters and a batch sampled from it."""
    policy, theta, obs, _, rng = fisher_case(sizes, n_rows, dtype)
    theta[-sizes[-1] :] = 0  # sigma 1
    mu, adv = tm.forward(policy, theta, obs), rng.standard_normal(n_rows).astype(dtype)
    return policy, theta, tm.Batch(obs, tm.sample(policy, mu, rng), adv - adv.mean(), mu)


def ours(policy, theta, batch):
    return lambda: None, lambda: tm.trpo_update(policy, theta, batch, CONFIG)[0]


def default(policy, theta, batch):
    """Ours with the default settings, whose solve is preconditioned and shorter, but ends elsewhere."""
    return lambda: None, lambda: tm.trpo_update(policy, theta, batch)[0]


def torch_parameters(module, theta, policy):
    """put() sets the weights of module, in order W, b of each layer, to theta; get() is theta as it is now."""
    import torch

    weights, log_std = module
    pairs = list(layers(policy, theta))

    def put():
        with torch.no_grad():
            for (W, b), (linear_W, linear_b) in zip(pairs, weights, strict=True):
                linear_W.copy_(torch.as_tensor(W.T))
                linear_b.copy_(torch.as_tensor(b))
            log_std.copy_(torch.as_tensor(theta[-policy.sizes[-1] :]).reshape(log_std.shape))

    def get():
        parts = [part for W, b in weights for part in (W.detach().numpy().T.ravel(), b.detach().numpy())]
        return np.concatenate([*parts, log_std.detach().numpy().ravel()])

    return put, get


def sb3(policy, theta, batch):
    """sb3-contrib's TRPO.train, without its value function."""
    import torch
    from sb3_contrib import TRPO
    from stable_baselines3.common.logger import Logger

    D, A, N = policy.sizes[0], policy.sizes[-1], len(batch.obs)
    env = gym.Env()
    env.observation_space = gym.spaces.Box(-np.inf, np.inf, (D,), np.float32)
    env.action_space = gym.spaces.Box(-1, 1, (A,), np.float32)
    # its KL is a mean over the components of the action too: with these, the problem that it solves is ours
    options = {"cg_damping": DAMPING / A, "target_kl": CONFIG.max_kl / A, "cg_max_steps": CONFIG.cg_iters}
    options |= {"n_critic_updates": 0, "normalize_advantage": False, "n_steps": N, "batch_size": N}
    model = TRPO("MlpPolicy", env, **options, policy_kwargs={"net_arch": list(policy.sizes[1:-1])}, device="cpu")
    model.set_logger(Logger(None, []))
    linears = [m for m in model.policy.mlp_extractor.policy_net if hasattr(m, "weight")] + [model.policy.action_net]
    put, get = torch_parameters(([(m.weight, m.bias) for m in linears], model.policy.log_std), theta, policy)
    buffer = model.rollout_buffer
    buffer.observations[:, 0], buffer.actions[:, 0], buffer.advantages[:, 0] = batch.obs, batch.actions, batch.adv
    buffer.log_probs[:, 0], buffer.full = tm.log_prob(policy, batch.mu_old, batch.actions), True
    model.policy.set_training_mode(True)
    torch.set_num_threads(threads())

    def run():
        model.train()
        return get()

    return put, run


def tianshou(policy, theta, batch):
    """Tianshou's TRPO, with a value function of one number."""
    import torch
    from tianshou.algorithm import TRPO
    from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
    from tianshou.algorithm.optim import AdamOptimizerFactory
    from tianshou.data import Batch
    from tianshou.utils.net.common import Net
    from tianshou.utils.net.continuous import ContinuousActorProbabilistic

    D, A = policy.sizes[0], policy.sizes[-1]

    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(torch.zeros(1))

        def forward(self, obs):
            return self.value.expand(len(obs))

    def dist(loc_scale):
        return torch.distributions.Independent(torch.distributions.Normal(*loc_scale), 1)

    net = Net(state_shape=(D,), hidden_sizes=policy.sizes[1:-1], activation=torch.nn.Tanh)
    actor = ContinuousActorProbabilistic(preprocess_net=net, action_shape=(A,), unbounded=True)
    space = gym.spaces.Box(-1, 1, (A,), np.float32)
    player = ProbabilisticActorPolicy(actor=actor, dist_fn=dist, action_space=space, action_scaling=False)
    options = {"max_kl": CONFIG.max_kl, "optim_critic_iters": 1, "advantage_normalization": False}
    algorithm = TRPO(policy=player, critic=Critic(), optim=AdamOptimizerFactory(), **options)
    linears = [m for m in [*net.modules(), *actor.mu.modules()] if isinstance(m, torch.nn.Linear)]
    put, get = torch_parameters(([(m.weight, m.bias) for m in linears], actor.sigma_param), theta, policy)
    log_prob = tm.log_prob(policy, batch.mu_old, batch.actions)
    tensors = {"act": batch.actions, "adv": batch.adv, "logp_old": log_prob, "returns": np.zeros_like(batch.adv)}
    rows = Batch(obs=batch.obs, info=Batch(), **{name: torch.as_tensor(array) for name, array in tensors.items()})
    torch.set_num_threads(threads())

    def run():
        algorithm._update_with_batch(rows, None, 1)
        return get()

    return put, run


def jax(policy, theta, batch):
    """Jitted from start to finish, with the same Gauss-Newton product: the strongest peer we could write."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    sizes, A, N = policy.sizes, policy.sizes[-1], len(batch.obs)

    def mean(theta, obs):
        at, h = 0, obs
        for layer, (m, n) in enumerate(itertools.pairwise(sizes)):
            h = h @ theta[at : at + m * n].reshape(m, n) + theta[at + m * n : at + m * n + n]
            h, at = jnp.tanh(h) if layer < len(sizes) - 2 else h, at + (m + 1) * n
        return h

    def log_prob(mu, log_std, actions):
        return -(0.5 * ((actions - mu) / jnp.exp(log_std)) ** 2 + log_std + 0.5 * tm.LOG_2PI).sum(axis=1)

    @jax.jit
    def update(theta, obs, actions, adv):
        std_old, mu_old = theta[-A:], mean(theta, obs)
        log_prob_old = log_prob(mu_old, std_old, actions)

        def surrogate(theta):
            return jnp.mean(jnp.exp(log_prob(mean(theta, obs), theta[-A:], actions) - log_prob_old) * adv)

        old, grad = jax.value_and_grad(surrogate)(theta)
        _, jvp = jax.linearize(lambda theta: mean(theta, obs), theta)
        _, vjp = jax.vjp(lambda theta: mean(theta, obs), theta)

        def F(v):
            (out,) = vjp(jvp(v) * jnp.exp(-2 * std_old) / N)
            return out.at[-A:].set(2 * v[-A:])

        def step(_, carry):
            x, r, p, rr = carry
            Ap = F(p) + DAMPING * p
            alpha = rr / (p @ Ap)
            r = r - alpha * Ap
            return x + alpha * p, r, r + (r @ r) / rr * p, r @ r

        x, *_ = jax.lax.fori_loop(0, CONFIG.cg_iters, step, (jnp.zeros_like(grad), grad, grad, grad @ grad))
        candidate = theta + jnp.sqrt(2 * CONFIG.max_kl / (x @ F(x))) * x
        mu, std = mean(candidate, obs), candidate[-A:]
        shift = ((mu_old - mu) / jnp.exp(std)) ** 2
        kl = (std - std_old + 0.5 * (jnp.exp(2 * (std_old - std)) - 1 + shift)).sum(axis=1).mean()
        return jnp.where((kl <= CONFIG.max_kl) & (surrogate(candidate) > old), candidate, theta)

    arrays = [jnp.asarray(array) for array in (theta, batch.obs, batch.actions, batch.adv)]
    return lambda: None, lambda: np.asarray(update(*arrays))


def peers(names, extra="bench"):
    """Those of these functions whose packages are installed; says how to install the others."""
    for peer, package in names.items():
        if importlib.util.find_spec(package):
            yield peer
        else:
            print(f'{package} is not installed and left out: pip install ".[{extra}]"')


def update(args):
    """One policy update, 10 plain CG iterations and one candidate, beside the same of sb3-contrib, Tianshou and JAX.

    And ours by default: of 4 iterations, preconditioned.
    """
    print(machine())
    others = list(peers({sb3: "sb3_contrib", tianshou: "tianshou", jax: "jax"}))
    print("\npolicy update, milliseconds, median (quartiles); 11-64-64-3; cosine: of the peer's step with ours")
    rows = []
    for n_rows in (2048,) if args.quick else (512, 2048, 16384):
        for dtype in (np.float32, np.float64):
            policy, theta, batch = gaussian_batch((11, 64, 64, 3), n_rows, dtype)
            if tm.trpo_update(policy, theta, batch, CONFIG)[1].backtracks:  # one way or the other the KL is below its
                batch = batch._replace(adv=-batch.adv)  # quadratic model, and the first candidate accepted
            assert tm.trpo_update(policy, theta, batch, CONFIG)[1].backtracks == 0
            taken, first = {}, None
            for peer in (ours, default, *others):
                if dtype == np.float64 and peer in (sb3, tianshou):  # they are float32 throughout
                    continue
                prepare, run = peer(policy, theta, batch)
                prepare()
                step = run().astype(np.float64) - theta
                first = step if first is None else first
                cosine = step @ first / np.linalg.norm(step) / np.linalg.norm(first)
                assert cosine > (0.9 if peer is default else 0.99), (
                    f"{peer.__name__} takes another step: cosine {cosine}"
                )
                taken[peer] = timed(run, args.repeats, prepare)
                ratio = taken[peer][0] / taken[ours][0]
                print(
                    f"{n_rows:6} {np.dtype(dtype).name} {peer.__name__:9} {milliseconds(taken[peer]):28} "
                    f"{ratio:6.2f}x  cosine {cosine:.6f}",
                    flush=True,
                )
                rows.append([threads(), n_rows, np.dtype(dtype).name, peer.__name__, *taken[peer]])
    record("update", "threads,rows,dtype,who,median,first quartile,third quartile", rows, args)
    if not args.quick:
        draw_update()


def draw_update():
    rows = read_csv(RESULTS / "update.csv")
    figure, axes = figures(1, 2, figsize=(10, 3.6), sharey=True)
    for ax, n in zip(axes, sorted({row["threads"] for row in rows}), strict=False):
        for who, colour in zip(("ours", "default", "jax", "sb3", "tianshou"), COLOURS, strict=False):
            for dtype, style in (("float32", "-"), ("float64", "--")):
                mine = [r for r in rows if (r["threads"], r["who"], r["dtype"]) == (n, who, dtype)]
                if mine:
                    x, y = ([float(r[key]) for r in mine] for key in ("rows", "median"))
                    ax.loglog(x, 1e3 * np.array(y), style, marker="o", color=colour, label=f"{who} {dtype}")
        ax.set(xlabel="rows of the batch", title=f"{n} thread{'s' * (n != '1')}")
    axes[0].set_ylabel("one policy update, ms")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(RESULTS / "update.png", dpi=120)


# =========================================================================================== training against stepping
class Recorder(gym.vector.VectorWrapper):
    """Remembers the calls, so that they can be made again, and the seconds that they and the remembering took."""

    def __init__(self, envs):
        super().__init__(envs)
        self.calls, self.seconds, self.remembering = [], 0.0, 0.0

    def call(self, name, *args, **kwargs):
        called = time.perf_counter()
        self.calls.append((name, copy.deepcopy(args), copy.deepcopy(kwargs)))  # before: reset empties its options
        start = time.perf_counter()
        result = getattr(self.env, name)(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.remembering += start - called
        return result

    def step(self, actions):
        return self.call("step", actions)

    def reset(self, **kwargs):
        return self.call("reset", **kwargs)


def sync(env, n):
    mode = gym.vector.AutoresetMode.DISABLED
    return gym.vector.SyncVectorEnv([lambda: gym.make(env)] * n, autoreset_mode=mode)


def own_vector(env, n):
    return gym.make_vec(env, n, vectorization_mode="vector_entry_point")


def envpool(env, n):
    import envpool

    return envpool.make(env, env_type="gymnasium", num_envs=n, num_threads=threads())


TRAIN = {  # environment, kind, environments stepped together, steps
    "CartPole-v1": ((sync, 8, 40_000), (own_vector, 8, 40_000), (envpool, 8, 40_000)),
    "HalfCheetah-v5": ((sync, 8, 20_000),),
    "Hopper-v5": ((sync, 8, 10_000),),
    "HalfCheetah-v4": ((envpool, 8, 20_000),),
}


def train(args):
    """Seconds of training over seconds of stepping: the calls that training made to the environments, made again.

    One by one, training steps what trpo_min makes of an id, stepping Gymnasium's SyncVectorEnv, which gathers infos.
    """
    print(machine())
    print(
        "\n                                          steps/s   training/stepping   of training, %: stepping, rollout, "
        "update, what the value fit adds to it, rest"
    )
    rows = []
    for env, kinds in TRAIN.items():
        for (make, n, steps), dtype in itertools.product(kinds, ("float64", "float32")):
            if make is envpool and not list(peers({envpool: "envpool"}, "envpool")):
                continue
            steps = steps // 10 if args.quick else steps
            config = tm.Config(total_steps=steps, stop_when_solved=False, dtype=dtype)
            ratios, shares = [], []
            for seed in range(1 + args.repeats):  # the first to compile
                one_by_one = config._replace(num_envs=n, vector="sync")
                envs = tm._make_envs(env, one_by_one)[0] if make is sync else make(env, n)
                envs, seconds = Recorder(envs), {}
                with clocked(seconds, "collect", "trpo_update", "_both"):
                    start = time.perf_counter()
                    state = tm.train(envs, config, seed=seed)
                    total = time.perf_counter() - start - envs.remembering
                again = make(env, n)
                start = time.perf_counter()
                for name, arguments, keywords in envs.calls:
                    getattr(again, name)(*arguments, **keywords)
                stepping = time.perf_counter() - start
                rollout = seconds["collect"] - envs.seconds - envs.remembering
                update = seconds["trpo_update"]
                parts = [envs.seconds, rollout, update, seconds["_both"] - update]
                if seed:
                    ratios.append((total / stepping, state.steps / total))
                    shares.append([*parts, total - sum(parts)] / np.array(total))
            (ratio, rate), share = np.median(ratios, axis=0), np.mean(shares, axis=0)
            low, high = np.percentile([r for r, _ in ratios], [25, 75])
            print(
                f"{env:15} {make.__name__:10} {n} envs {dtype} {rate:9,.0f}  {ratio:6.2f} ({low:.2f}-{high:.2f})    "
                f"{' '.join(f'{100 * s:3.0f}' for s in share)}",
                flush=True,
            )
            rows.append([threads(), env, make.__name__, n, dtype, rate, ratio, low, high, *share])
    record("train", "threads,env,vector,envs,dtype,steps/s,ratio,q1,q3,stepping,rollout,update,value,rest", rows, args)
    if not args.quick:
        draw_train()


@contextlib.contextmanager
def clocked(seconds, *names):
    """Within, the time spent in these functions of trpo_min is added to seconds."""
    before = {name: getattr(tm, name) for name in names}

    def timer(name):
        def call(*args, **kwargs):
            start = time.perf_counter()
            result = before[name](*args, **kwargs)
            seconds[name] = seconds.get(name, 0) + time.perf_counter() - start
            return result

        return call

    for name in names:
        setattr(tm, name, timer(name))
    yield
    for name in names:
        setattr(tm, name, before[name])


def draw_train():
    rows = [row for row in read_csv(RESULTS / "train.csv") if row["vector"] == "sync"]
    figure, ax = figures(1, 1, figsize=(8, 4))
    labels, left = (
        [f"{r['env']}, {r['dtype']}, {r['threads']} thread{'s' * (r['threads'] != '1')}" for r in rows],
        np.zeros(len(rows)),
    )
    for part, colour in zip(("stepping", "rollout", "update", "value", "rest"), COLOURS, strict=True):
        share = np.array([float(r[part]) * 100 for r in rows])
        label = "what the value fit adds" if part == "value" else part
        ax.barh(labels, share, left=left, color=colour, label=label)
        left += share
    ax.set(xlabel="% of the time of training", xlim=(0, 100))
    ax.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8)
    figure.savefig(RESULTS / "train.png", dpi=120)


# ================================================================================================ from the shell's side
SB3_SOLVE = """
import sys, time, numpy as np
from sb3_contrib import TRPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

class Solved(BaseCallback):
    def _on_step(self):
        returns = [episode["r"] for episode in self.model.ep_info_buffer]
        return len(returns) < 100 or np.mean(returns) < 475

model = TRPO("MlpPolicy", make_vec_env("CartPole-v1", 2, seed=int(sys.argv[1])), n_steps=512, batch_size=512,
             cg_damping=1e-3, gae_lambda=0.98, gamma=0.99, learning_rate=1e-3, n_critic_updates=20,
             seed=int(sys.argv[1]), device="cpu")
model.learn(int(sys.argv[2]), callback=Solved())
print("solved" if model.num_timesteps < int(sys.argv[2]) else "not solved", model.num_timesteps)
"""


def seconds_of(*command, until="", **env):
    """Seconds from the start of python with these arguments to its first line that holds until, or to its end."""
    start, seconds, printed = time.perf_counter(), None, ""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": HERE}
    with subprocess.Popen([sys.executable, "-u", *map(str, command)], env=os.environ | env, **pipe) as process:
        for line in process.stdout:
            printed += line
            if until and until in line:
                seconds = seconds or time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{command} failed: {printed}")
    return seconds or time.perf_counter() - start, printed


def solve(args):
    """CartPole-v1 from the start of the process to solved, beside sb3-contrib with the settings of its zoo."""
    print(machine())

    def trpo_min(*options):
        command = ["trpo_min.py", "--env", "CartPole-v1", "--quiet", *options]
        return lambda seed, most: [*command, "--seed", seed, "--total-steps", most, "--out", scratch()]

    commands = {"ours": (trpo_min(), 1_000_000), "ours in float32": (trpo_min("--dtype", "float32"), 1_000_000)}
    for command, _ in commands.values():  # to compile
        seconds_of(*command(0, 2048))
    if list(peers({sb3: "sb3_contrib"})):
        commands["sb3-contrib"] = (lambda seed, most: ["-c", SB3_SOLVE, seed, most]), 300_000
    rows = []
    for who, (command, most) in commands.items():
        for seed in range(1 if args.quick else args.seeds):
            seconds, printed = seconds_of(*command(seed, 5_000 if args.quick else most))
            solved = printed.splitlines()[-1].startswith("solved")
            rows.append([threads(), who, seed, seconds, solved])
            print(
                f"{who:19} seed {seed}: {seconds:6.2f} s  {printed.splitlines()[-1] if not solved else 'solved'}",
                flush=True,
            )
    record("solve", "threads,who,seed,seconds,solved", rows, args)
    for who in commands:
        mine = [row[3:] for row in rows if row[1] == who]
        seconds, n = np.percentile([s for s, _ in mine], [50, 25, 75]), sum(done for _, done in mine)
        print(f"{who}: median {seconds[0]:.2f} s ({seconds[1]:.2f}-{seconds[2]:.2f}), {n} of {len(mine)} solved")


def start(args):
    """From the start of the process to the first finished update: with an empty cache, and later."""
    print(machine())
    command, rows = ("trpo_min.py", "--env", "CartPole-v1", "--total-steps", "2048", "--out"), []
    for _ in range(1 if args.quick else args.repeats):
        cache = scratch()
        for kind in ("first run", *["later run"] * (1 if args.quick else 3)):
            rows.append([threads(), kind, seconds_of(*command, scratch(), until="EV", NUMBA_CACHE_DIR=str(cache))[0]])
    for kind in ("first run", "later run"):
        median, low, high = np.percentile([row[2] for row in rows if row[1] == kind], [50, 25, 75])
        print(f"{kind}: {median:.2f} s ({low:.2f}-{high:.2f}) to the first finished update")
    record("start", "threads,kind,seconds", rows, args)


def scaling(args):
    """Growth of F v and of the whole update with rows, with parameters and with depth; and the peak of memory."""
    print(machine())
    cases = [("rows", n, (11, 64, 64, 3), n) for n in (1024, 4096, 16384, 65536)]
    cases += [("parameters, wider", None, (11, h, h, 3), 2048) for h in (64, 128, 256, 512, 1000)]
    cases += [("parameters, deeper", None, (11, *[64] * depth, 3), 2048) for depth in (4, 8, 16, 32)]
    if args.quick:
        cases = [case for case in cases if tm.n_params(tm.Policy(case[2], "gaussian")) * case[3] < 5e7]
    points = {}
    print("\nfloat64; growing with        at    network            rows   parameters        F v, ms     update, ms")
    for axis, at, sizes, n_rows in cases:
        policy, theta, batch = gaussian_batch(sizes, n_rows, np.float64)
        at, v = at or len(theta), np.ones_like(theta)
        product, repeats = kernel(policy, theta, batch.obs), max(3, min(args.repeats, int(4e9 / len(theta) / n_rows)))
        with tm._one_blas_thread():
            times = [timed(lambda f=product, v=v: f(v), repeats)[0]]
        times.append(timed(default(policy, theta, batch)[1], repeats)[0])
        points.setdefault(axis, []).append((at, *times))
        shown = "-".join(map(str, sizes)) if len(sizes) < 6 else f"11-{len(sizes) - 2} x 64-3"
        print(
            f"{axis:22} {at:10,}    {shown:15} {n_rows:7,} {len(theta):12,} {times[0] * 1e3:14.2f} "
            f"{times[1] * 1e3:14.2f}",
            flush=True,
        )
    for axis, rows in points.items():
        x, *y = np.log(np.array(rows)).T
        slopes = [np.polyfit(x, each, 1)[0] if len(x) > 1 else np.nan for each in y]
        print(f"log-log slope with {axis}: F v {slopes[0]:.2f}, update {slopes[1]:.2f}")
    policy, theta, obs, v, _ = fisher_case((11, 16, 16, 3), 512, np.float64)
    F = dense_fisher(policy, theta, obs)
    print(
        f"the dense matrix is {F.nbytes / 1e6:.1f} MB for {len(theta)} parameters, "
        f"and would be {8e-9 * 1e12:,.0f} GB for a million: it is never formed"
    )
    n_rows = 5000 if args.quick else 100_000
    policy, theta, batch = gaussian_batch((11, 64, 64, 3), n_rows, np.float64)
    tracemalloc.start()
    tm.trpo_update(policy, theta, batch)
    peak, acts = tracemalloc.get_traced_memory()[1], 8 * n_rows * (11 + 64 + 64 + 3)
    tracemalloc.stop()
    print(
        f"peak memory of an update on {n_rows:,} rows: {peak / 1e6:.0f} MB beyond the batch, {peak / acts:.1f} times "
        "the activations"
    )
    record("scaling", "threads,axis,at,F v,update", [[threads(), a, *p] for a, ps in points.items() for p in ps], args)
    if not args.quick:
        draw_scaling()


def draw_scaling():
    rows = read_csv(RESULTS / "scaling.csv")
    figure, axes = figures(1, 3, figsize=(10, 3.4), sharey=True)
    for ax, axis in zip(axes, dict.fromkeys(row["axis"] for row in rows), strict=True):
        for what, colour in zip(("F v", "update"), COLOURS, strict=False):
            for n, style in (("1", "-"), ("2", "--")):
                mine = [r for r in rows if (r["axis"], r["threads"]) == (axis, n)]
                x, y = ([float(r[key]) for r in mine] for key in ("at", what))
                label = f"{what}, {n} thread{'s' * (n != '1')}"
                ax.loglog(x, 1e3 * np.array(y), style, marker="o", color=colour, label=label)
        ax.loglog(x, np.array(x) / x[0] * y[0] * 1e3, ":", color="grey", label="slope 1")
        ax.set(xlabel=axis)
        ax.tick_params(axis="x", which="minor", labelbottom=False)
    axes[0].set_ylabel("ms")
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / "scaling.png", dpi=120)


def install(args):
    """A fresh virtual environment with this project, and one with sb3-contrib: seconds, and megabytes on disk."""
    print(machine())
    for name, what in {"trpo_min": str(HERE), "sb3-contrib": "sb3-contrib"}.items():
        if args.quick and name != "trpo_min":
            continue
        folder = scratch()
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        empty, begin = size_of(folder), time.perf_counter()
        pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check", what]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        print(f"{name:12} {seconds:5.0f} s, {(size_of(folder) - empty) / 1e6:6.0f} MB", flush=True)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


# ======================================================================================================== several ranks
class Counted:
    """A communicator that notes how many bytes a rank puts into each call, 8 for a number and 64 for a hash."""

    def __init__(self, comm):
        self.comm, self.sent = comm, []

    def Allreduce(self, x, total):
        self.sent.append(x.nbytes)
        self.comm.Allreduce(x, total)

    def allreduce(self, *args):
        self.sent.append(8)
        return self.comm.allreduce(*args)

    def allgather(self, digest):
        self.sent.append(len(digest))
        return self.comm.allgather(digest)


def steps_per_second(env, quick, num_envs=8, vector="sync"):
    """Of training, from its second update to its last."""
    seen, total_steps = [], 2048 * (4 if quick else 24)
    config = tm.Config(num_envs=num_envs, vector=vector, rollout_steps=2048, total_steps=total_steps)
    tm.train(env, config, callback=lambda state, *_: seen.append((time.perf_counter(), state.steps)))
    (begin, first), (end, last) = seen[1], seen[-1]
    return (last - first) / (end - begin)


def scale_rank(args):
    """What each rank does of scale; the first prints what it measured."""
    from mpi4py import MPI

    world, result, n_rows = MPI.COMM_WORLD, {}, 2048 if args.quick else 16384
    policy, theta, batch = gaussian_batch((11, 64, 64, 3), n_rows, np.float64)
    rows = slice(world.rank * n_rows // world.size, (world.rank + 1) * n_rows // world.size)
    part = batch._replace(**{name: getattr(batch, name)[rows] for name in batch._fields[:4]})
    calls = {
        "alone": lambda: tm.trpo_update(policy, theta, part, CONFIG),
        "strong": lambda: tm.trpo_update(policy, theta, part, CONFIG),
        "weak": lambda: tm.trpo_update(policy, theta, batch, CONFIG),
        "large": lambda: world.Allreduce(theta, np.empty_like(theta)),
        "small": lambda: world.Allreduce(theta[:2], np.empty(2)),
    }
    for name, call in calls.items():
        with contextlib.nullcontext() if name == "alone" else tm.data_parallel(world):
            call()
            result[name] = timed(call, args.repeats, world.Barrier)[0]
    with tm.data_parallel(world):
        result["training"] = steps_per_second("Humanoid-v5", args.quick, 8 // world.size)
    counted = Counted(world)
    with tm.data_parallel(counted):
        info = tm.trpo_update(policy, theta, part, CONFIG)[1]
    candidates = info.backtracks + 1
    result |= {"ranks": world.size, "P": len(theta), "messages": len(counted.sent), "bytes": sum(counted.sent)}
    # gradient and ten F v; surrogate at old, entropy, two means a candidate, each with its count; three largest; hash
    messages = 11 + 2 + 2 * candidates + 3 + 1
    result["expected"] = [messages, 8 * (11 * (len(theta) + 1) + 2 * (2 + 2 * candidates) + 3) + 64]
    if world.rank == 0:
        print(json.dumps(result))


def scale(args):
    """Several MPI ranks: strong and weak scaling, what they send against its formula, and other ways on one machine."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ:
        scale_rank(args)
        return
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not (mpirun and importlib.util.find_spec("mpi4py")):
        print('mpi4py or mpirun is not installed: pip install ".[mpi]"')
        return
    print(machine())
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "NUMBA_NUM_THREADS": "1"}
    env["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"  # on a machine of one core too
    command = [sys.executable, __file__, "scale", "--repeats", args.repeats, *(["--quick"] if args.quick else [])]
    one, two = (
        json.loads(subprocess.check_output([*map(str, [mpirun, "-n", n, *command])], env=env, text=True))
        for n in (1, 2)
    )
    print(f"\nupdate on {2048 if args.quick else 16384:,} rows, float64, {one['P']:,} parameters, ms")
    print(f"one process {one['alone'] * 1e3:.2f}, as the only rank {one['strong'] * 1e3:.2f}")
    print(
        f"two ranks, half of the rows each {two['strong'] * 1e3:.2f}: {one['alone'] / two['strong']:.2f} times as fast"
    )
    print(f"two ranks, as many rows each {two['weak'] * 1e3:.2f}: {one['alone'] / two['weak']:.2f} of the speed a rank")
    print(f"a reduction of P numbers {two['large'] * 1e6:.0f} us, of two {two['small'] * 1e6:.0f} us")
    for name, at in (("messages", 0), ("bytes", 1)):
        print(f"{name} of an update: counted {two[name]:,}, by the formula {two['expected'][at]:,}")
    ways = {"sync": one["training"], "2 ranks": two["training"]}
    ways["async"] = steps_per_second("Humanoid-v5", args.quick, vector="async")
    if list(peers({envpool: "envpool"}, "envpool")):
        ways["EnvPool"] = steps_per_second(envpool("Humanoid-v4", 8), args.quick)
    print("\ntraining, 8 environments, steps/s: " + ", ".join(f"{way} {rate:,.0f}" for way, rate in ways.items()))
    times = []
    sizes = (512, 1024, 2048) if args.quick else (1024, 4096, 16384, 65536)
    for n_rows in sizes:
        policy, theta, batch = gaussian_batch((11, 64, 64, 3), n_rows, np.float64)
        times.append(timed(ours(policy, theta, batch)[1], args.repeats)[0])
    per_row, fixed = np.polyfit(sizes, times, 1, w=1 / np.array(times))  # by relative errors: all sizes count alike
    print(f"model: {fixed * 1e3:.2f} ms + {per_row * 1e6:.3f} us a row of a rank + what the network takes")
    for name, latency, bandwidth in NETWORKS:
        for n_rows in ROWS:
            ranks = np.arange(1, 1025)
            seconds = modelled(ranks, n_rows, one["P"], fixed, per_row, latency, bandwidth)
            best, shares = int(seconds.argmin()), network(ranks, one["P"], latency, bandwidth) / seconds
            half = next((f"{n}" for n, share in zip(ranks, shares, strict=True) if share > 0.5), "more than 1,024")
            print(
                f"{name}, {n_rows:,} rows: fastest at {ranks[best]} ranks, {seconds[0] / seconds[best]:.0f} times one; "
                f"the network takes half of the time from {half} ranks"
            )
    if not args.quick:
        rows = {**ways, "fixed": fixed, "per row": per_row, "P": one["P"]}
        record("scale", "threads,what,value", [[threads(), *row] for row in rows.items()], args)
        draw_scale()


NETWORKS = (("InfiniBand, 2 us and 10 GB/s", 2e-6, 10e9), ("Ethernet, 30 us and 1 GB/s", 30e-6, 1e9))
ROWS = (50_000, 1_000_000)


def network(ranks, P, latency, bandwidth):
    """Seconds in the reductions of an update: log2 R messages up and as many down; each number is sent twice."""
    ranks, large, small = np.asarray(ranks, float), 11, 8
    messages = (large + small) * 2 * np.ceil(np.log2(ranks)) * latency
    return messages + large * 2 * (ranks - 1) / ranks * 8 * (P + 1) / bandwidth


def modelled(ranks, n_rows, P, fixed, per_row, latency, bandwidth):
    """Seconds of an update on n_rows in all: the same work a row on each rank, no rank late, nothing overlapped."""
    return fixed + per_row * np.ceil(n_rows / np.asarray(ranks)) + network(ranks, P, latency, bandwidth)


def draw_scale():
    measured = {row["what"]: float(row["value"]) for row in read_csv(RESULTS / "scale.csv")}
    fixed, per_row, P = (measured[name] for name in ("fixed", "per row", "P"))
    figure, axes = figures(1, 2, figsize=(9, 3.6), sharey=True)
    ranks = 2 ** np.arange(11)
    for ax, n_rows in zip(axes, ROWS, strict=True):
        for (name, *speeds), colour in zip(NETWORKS, COLOURS, strict=False):
            seconds = modelled(ranks, n_rows, P, fixed, per_row, *speeds)
            ax.loglog(ranks, 1e3 * seconds, marker="o", color=colour, label=name)
            ax.loglog(ranks[1:], 1e3 * network(ranks[1:], P, *speeds), "--", color=colour, label="of which the network")
        ax.loglog(ranks, 1e3 * per_row * n_rows / ranks, ":", color="grey", label="rows only")
        ax.axhline(1e3 * fixed, color="black", linewidth=0.8, label="what each rank does whatever its rows")
        ax.set(xlabel="ranks", title=f"{n_rows:,} rows in all")
    axes[0].set_ylabel("ms an update (model)")
    axes[0].legend(fontsize=7)
    figure.savefig(RESULTS / "scale.png", dpi=120)


# ============================================================================================================ learning
PUBLISHED = {  # the best published TRPO after 1,000,000 steps, of any code and version of the environment
    "HalfCheetah-v5": 4471,  # Tianshou's README, largest over training
    "Hopper-v5": 3372,  # sb3-contrib's documentation, as Walker2d, Ant and Swimmer
    "Walker2d-v5": 4502,
    "Ant-v5": 3554,
    "Swimmer-v5": 359,
    "Reacher-v5": -4.8,  # OpenAI Baselines
    "InvertedPendulum-v5": 1000,  # Tianshou, as the next
    "InvertedDoublePendulum-v5": 8435,
    "Humanoid-v5": 1030,  # Engstrom et al. 2020, TRPO+
}
ROW = ["who", "settings", "env", "seed", "steps", "return", "deviation", "length", "training_return", "seconds"]


def play(predict, env, seed, episodes=10):
    """Mean return, its deviation, and mean length of episodes of a deterministic policy."""
    totals = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=seed if episode == 0 else None)
        rewards, ended = [], False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(predict(obs))
            rewards.append(reward)
            ended = terminated or truncated
        totals.append((sum(rewards), len(rewards)))
    returns, lengths = np.array(totals).T
    return [round(float(x), 3) for x in (returns.mean(), returns.std(), lengths.mean())]


def learn_ours(env, settings, seed, total_steps, every, report):
    config = tm.Config(total_steps=total_steps, stop_when_solved=False)._replace(**settings)
    (envs, _), test, due = tm._make_envs(env, config), gym.make(env), [every]

    def callback(state, info, explained):
        if state.steps >= min(due[0], total_steps - envs.num_envs + 1):
            due[0] += every
            report(state.steps, play(state.act, test, 1000 + seed), np.mean(state.returns or (np.nan,)))

    tm.train(envs, config, seed=seed, callback=callback)
    return " ".join(f"{name}={value}" for name, value in config._asdict().items())


ZOO = {  # the settings of rl-baselines3-zoo, hyperparams/trpo.yml
    "n_steps": 1024, "batch_size": 128, "gamma": 0.99, "gae_lambda": 0.95, "sub_sampling_factor": 1,
    "cg_max_steps": 25, "cg_damping": 0.1, "n_critic_updates": 20, "learning_rate": 1e-3,
}  # fmt: skip


def learn_sb3(env, settings, seed, total_steps, every, report):
    from sb3_contrib import TRPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    settings = ZOO | ({"target_kl": 0.04} if env.startswith("HalfCheetah") else {}) | settings
    envs = VecNormalize(make_vec_env(env, 2, seed=seed), gamma=settings["gamma"])
    test, due = gym.make(env), [every]

    class Report(BaseCallback):
        def _on_rollout_start(self):
            if self.num_timesteps >= due[0]:
                self.due()

        def _on_step(self):
            return True

        def due(self):
            due[0] += every
            training = [episode["r"] for episode in self.model.ep_info_buffer]
            result = play(lambda obs: model.predict(envs.normalize_obs(obs), deterministic=True)[0], test, 1000 + seed)
            report(self.num_timesteps, result, np.mean(training))

    model, callback = TRPO("MlpPolicy", envs, seed=seed, device="cpu", **settings), Report()
    model.learn(total_steps, callback=callback)
    callback.due()
    return " ".join(f"{name}={value}" for name, value in (settings | {"n_envs": 2, "normalize": True}).items())


def learn_one(who, settings, env, seed, total_steps, every, path):
    """One run: a row for each evaluation, appended as it is made; at the end a row about the run."""
    start, key = time.perf_counter(), [who, settings, env, seed]

    def append(path, header, row):
        with open(path, "a", newline="") as file:  # one write: rows of two processes do not mix
            text = io.StringIO()
            csv.writer(text).writerows([header, row] if file.tell() == 0 else [row])
            file.write(text.getvalue())

    def report(steps, result, training_return):
        seconds = time.perf_counter() - start
        append(path, ROW, [*key, steps, *result, round(float(training_return), 3), round(seconds, 1)])

    overrides = {name: ast.literal_eval(value) for name, value in (each.split("=") for each in settings.split())}
    run = {"ours": learn_ours, "sb3-contrib": learn_sb3}[who]
    config = run(env, overrides, seed, total_steps, every, report)
    runs = path.with_name(path.stem + "_runs.csv")
    append(runs, [*ROW[:4], "total_steps", "config", "versions"], [*key, total_steps, config, machine()])


def learn(args):
    """Train seeds on each environment, with evaluations of 10 deterministic episodes; goes on where it stopped."""
    path = scratch() / "learn.csv" if args.quick else args.out or RESULTS / "learn.csv"
    envs, total_steps = args.env or list(PUBLISHED), 4000 if args.quick else args.total_steps
    key, done = (args.who, " ".join(args.set)), set()
    runs = path.with_name(path.stem + "_runs.csv")
    if runs.exists():
        done = {(row["who"], row["settings"], row["env"], int(row["seed"])) for row in read_csv(runs)}
    jobs = [(*key, env, seed) for seed in range(args.seeds) for env in envs if (*key, env, seed) not in done]
    if path.exists():  # what a run left that was cut short
        rows = [r for r in read_csv(path) if (r["who"], r["settings"], r["env"], int(r["seed"])) not in jobs]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([ROW, *([row[name] for name in ROW] for row in rows)])
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        every = 2000 if args.quick else args.every
        for each in [pool.submit(learn_one, *job, total_steps, every, path) for job in jobs]:
            each.result()
    summarize(read_csv(path))
    if args.plot:
        draw_learn(read_csv(path))


def grouped(rows):
    """{(env, who and settings): {seed: (steps, returns)}}."""
    curves = {}
    for row in rows:
        label = f"{row['who']} {row['settings']}".strip()
        curves.setdefault((row["env"], label), {}).setdefault(int(row["seed"]), []).append(
            (int(row["steps"]), float(row["return"]))
        )
    return {key: {seed: np.array(run).T for seed, run in runs.items()} for key, runs in curves.items()}


def summarize(rows):
    """Final and largest evaluation, mean and deviation over seeds; interquartile mean of the final, 95% interval."""
    rng = np.random.default_rng(0)
    print(f"{'':54}seeds  final: mean +- deviation, interquartile mean (95%)    largest over training")
    for (env, label), runs in sorted(grouped(rows).items()):
        final, best = (np.array([f(returns) for _, returns in runs.values()]) for f in (lambda r: r[-1], np.max))
        middle = scipy.stats.trim_mean(rng.choice(final, (10_000, len(final))), 0.25, axis=1)
        low, high = np.percentile(middle, [2.5, 97.5])
        sd = [np.std(x, ddof=1) if len(x) > 1 else np.nan for x in (final, best)]
        print(
            f"{env:26}{label:28}{len(final):5}  {final.mean():8.1f} +- {sd[0]:6.1f}, "
            f"{scipy.stats.trim_mean(final, 0.25):8.1f} ({low:.1f} to {high:.1f})   {best.mean():8.1f} +- {sd[1]:6.1f}"
        )


def draw_learn(rows):
    """results/learn.png: for each environment the evaluations of ours and of sb3-contrib, and the best published."""
    curves = grouped(row for row in rows if row["env"] in PUBLISHED)
    figure, axes = figures(3, 3, figsize=(13, 10))
    for axis, (env, published) in zip(axes.flat, PUBLISHED.items(), strict=True):
        for (_, label), colour in zip(sorted(key for key in curves if key[0] == env), COLOURS, strict=False):
            runs = list(curves[env, label].values())
            n = min(len(returns) for _, returns in runs)
            steps, returns = runs[0][0][:n], np.stack([each[:n] for _, each in runs])
            axis.plot(steps, returns.mean(axis=0), color=colour, label=f"{label}, {len(runs)} seeds")
            spread = returns.std(axis=0, ddof=min(1, len(runs) - 1))
            axis.fill_between(
                steps, returns.mean(axis=0) - spread, returns.mean(axis=0) + spread, color=colour, alpha=0.2
            )
        axis.axhline(published, color="black", linewidth=0.8, linestyle="--", label="best published")
        axis.set(title=env, xlabel="environment steps", ylabel="return of 10 deterministic episodes")
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "learn.png", dpi=110)


# ======================================================================================== kinds of environments; soak
class Match(gym.Env):
    """A custom environment: a reward of 1 for each part of the action that equals what a Dict observation asks for."""

    def __init__(self, actions):
        self.action_space = {
            "MultiDiscrete": gym.spaces.MultiDiscrete([3, 4]),
            "MultiBinary": gym.spaces.MultiBinary(4),
        }[actions]
        self.observation_space = gym.spaces.Dict({"wanted": self.action_space, "clock": gym.spaces.Box(0, 1)})

    def observe(self):
        return {"wanted": self.wanted, "clock": np.array([self.t / 10], np.float32)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.action_space.seed(int(self.np_random.integers(2**31)))
        self.t, self.wanted = 0, self.action_space.sample()
        return self.observe(), {}

    def step(self, action):
        reward = float((action == self.wanted).sum())
        self.t, self.wanted = self.t + 1, self.action_space.sample()
        return self.observe(), reward, False, self.t == 10, {}


ENVIRONMENTS = (  # environment, its arguments, steps, what it is
    ("CartPole-v1", {}, 100_000, "classic control"),
    ("FrozenLake-v1", {"is_slippery": False}, 50_000, "toy text"),
    ("LunarLander-v3", {}, 300_000, "Box2D"),
    ("InvertedPendulum-v5", {}, 150_000, "MuJoCo"),
    ("Match-v0", {"actions": "MultiDiscrete"}, 30_000, "custom: Dict observations, MultiDiscrete actions; best 20"),
    ("Match-v0", {"actions": "MultiBinary"}, 30_000, "custom: Dict observations, MultiBinary actions; best 40"),
    (
        "flappy_bird_gymnasium:FlappyBird-v0",
        {"use_lidar": False},
        100_000,
        "third party: pip install flappy-bird-gymnasium",
    ),
)


def environments(args):
    """One environment of each kind, 3 seeds of the default Config, and 20 episodes of the most likely actions each."""
    path, rows = RESULTS / "environments.csv", []
    gym.register("Match-v0", Match)
    for env, env_args, steps, what in ENVIRONMENTS:
        if ":" in env and not importlib.util.find_spec(env.split(":")[0]):
            print(f"{env} left out: {what}")
            continue
        config, means = tm.Config(total_steps=2000 if args.quick else steps), []
        for seed in range(1 if args.quick else 3):
            state = tm.train(lambda env=env, env_args=env_args: gym.make(env, **env_args), config, seed=seed)
            returns, _ = tm.evaluate(state, gym.make(env, **env_args), 20, seed=1000)
            means.append(returns.mean())
            rows.append([env, env_args, seed, state.steps, *np.round([means[-1], returns.std()], 2), machine()])
        spread = np.std(means, ddof=1) if len(means) > 1 else np.nan
        print(f"{env} {env_args or ''} ({what}): {np.mean(means):.1f} +- {spread:.1f} at {state.steps:,}", flush=True)
    if not args.quick:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["env", "env_args", "seed", "steps", "return", "deviation", "versions"])
            writer.writerows(rows)


def soak(args):
    """The memory of a run of Pendulum-v1 from the shell, every 10 s for so many minutes; Linux."""
    folder, minutes = scratch(), 0.5 if args.quick else args.minutes
    command = [sys.executable, HERE / "trpo_min.py", "--env", "Pendulum-v1", "--total-steps", "1_000_000_000"]
    process = subprocess.Popen([*command, "--quiet", "--out", folder / "run"], stdout=subprocess.DEVNULL)
    start, rows = time.monotonic(), []
    while time.monotonic() - start < 60 * minutes:
        time.sleep(10)
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        rows.append([round(time.monotonic() - start), pages * os.sysconf("SC_PAGE_SIZE") // 1024])
        if not args.quick:
            with open(RESULTS / "soak.csv", "w", newline="") as file:
                csv.writer(file).writerows([["seconds", "kilobytes"], *rows])
    process.terminate()
    process.wait()
    state, (seconds, kilobytes) = tm.load(folder / "run"), np.array(rows).T
    later = kilobytes[len(rows) // 6 :]
    print(machine())
    print(
        f"{seconds[-1]:,} s, {state.updates:,} updates, {state.steps:,} steps: {later.min():,} to {later.max():,} KB "
        f"after the first sixth of the time, {kilobytes[-1] - later[0]:+,} KB from there to the end"
    )


# =============================================================================================== E11, and where it ends
def at_rest(env, config, updates, seed=0):
    """A TrainState after some updates on env, and sample() for any number of rollouts of it: (rollout, branches)."""
    config = config._replace(total_steps=10**9, stop_when_solved=False)
    single = config._replace(sampling="single_path")  # the same policy whatever is measured on it
    state = tm.train(env, single, seed=seed, callback=lambda state, *_: state.updates == updates)
    state, (envs, _) = state._replace(config=config), tm._make_envs(env, config)
    rng, runner = np.random.default_rng(seed), tm._first_runner(envs, seed)
    now = envs, state.policy, state.theta, state.obs_stats
    n_saved, _ = tm._vine_plan(envs, state.policy, config) if config.sampling == "vine" else (0, 1)
    n_steps = config.rollout_steps // envs.num_envs

    def sample():
        nonlocal runner
        rollout, runner = tm.collect(*now, runner, rng, n_steps, config.gamma, n_saved)
        return rollout, tm.branch(*now, rollout, rng, config) if n_saved else None

    return state, sample


def reward_scale(state):
    return tm._inverse_std(state.reward_stats)[0]


def bound(args):
    """The step that maximises the lower bound of E11 beside the trust region's, in one update on CartPole-v1."""
    state, sample = at_rest("CartPole-v1", tm.Config(num_envs=4, max_kl=0.01, kl_schedule="constant"), 20)
    batch, *_ = tm._targets(state, *sample(), (), reward_scale(state))
    gamma, found = state.config.gamma, []
    print(machine())
    print("\none update on CartPole-v1 after 20, stopped at different KL; in units of the scaled return")
    print("  max_kl   largest KL    step length   surrogate gain   penalty of E11   lower bound")
    for exponent in np.arange(-2, -17, -2 if args.quick else -0.25):
        max_kl = 10.0**exponent
        _, info = tm.trpo_update(state.policy, state.theta, batch, state.config._replace(max_kl=max_kl))
        gain = info.surrogate - info.surrogate_old
        lower = tm.improvement_lower_bound(gain, info.adv_largest, info.kl_largest, gamma)
        found.append((lower, max_kl, info))
        if exponent % 2 == 0:
            gain /= 1 - gamma
            print(
                f"{max_kl:8.0e} {info.kl_largest:12.2e} {info.step_length:14.2e} {gain:16.2e} "
                f"{gain - lower:16.2e} {lower:13.2e}"
            )
    lower, max_kl, info = max(found, key=lambda each: each[0])
    ratio = found[0][2].step_length / info.step_length
    print(
        f"the bound is largest, {lower:.1e}, at a mean KL of {max_kl:.0e}: "
        f"a step {ratio:,.0f} times shorter than that of max_kl 0.01"
    )


# ======================================================================================================== the value fit
TRIED = {
    "value_rollouts": (1, 2, 8),
    "value_iters": (2, 3),
    "cg_iters": (2, 3, 10),
    "value_damping": (0.01, 0.1),
}
FITS = {"default": {}, "plain, cg_iters 10": {"precondition": False, "cg_iters": 10}} | {
    f"{name} {value}": {name: value} for name, tried in TRIED.items() for value in tried
}


def followed(env, settings, steps):
    """Of each of FITS along one and the same training run: how well it predicts each rollout, then how long it takes.

    How well: 1 - variance of V - G over that of G, before the fit has seen the rollout; G is the discounted return,
    with the run's own V where the rollout ends.  A level that is off changes no advantage, as these are centred.
    """
    phis, found, rollouts, learn = {}, {name: [] for name in FITS}, [], tm.learn

    def learn_beside(state, rollout, *rest):
        rollouts[:] = [*rollouts[-7:], rollout]
        reward_stats = tm.update_stats(state.reward_stats, rollout.discounted[rollout.real][:, None])
        scale = reward_scale(state._replace(reward_stats=reward_stats))
        monte_carlo = state._replace(config=state.config._replace(lam=1.0))
        _, obs, G, *_ = tm._targets(monte_carlo, rollout, None, (), scale)
        for name, changes in FITS.items():
            mine = state._replace(phi=phis.get(name, state.phi), config=state.config._replace(**changes))
            error = tm.forward(state.value, mine.phi, obs)[:, 0] - G
            start = time.perf_counter()
            earlier = rollouts[-mine.config.value_rollouts : -1]
            _, *rows, _, _ = tm._targets(mine, rollout, None, earlier, scale)
            phis[name] = tm.fit_value(state.value, mine.phi, *rows, mine.config)
            found[name].append((1 - np.var(error) / np.var(G), time.perf_counter() - start))
        return learn(state, rollout, *rest)

    with unittest.mock.patch.object(tm, "learn", learn_beside):
        config = tm.Config(stop_when_solved=False, **settings)
        tm.train(env, config, seed=0, callback=lambda state, *_: state.steps >= steps)
    return found


def fits(args):
    """Value fits that all follow one training run: how well each predicts its next rollout, and what each costs."""
    cases = {"CartPole-v1": {}} if args.quick else {"Hopper-v5": {}, "HalfCheetah-v5": {}, "Ant-v5": {}}
    cases |= {} if args.quick else {"Swimmer-v5": {"gamma": 0.9999}}
    rows = []
    print(machine())
    print(f"{'':56}ms per fit   explained of the next rollout: median of the 2nd, 3rd, last quarter of the run")
    for env, settings in cases.items():
        for name, pairs in followed(env, settings, 8_000 if args.quick else 80_000).items():
            explained, seconds = np.array(pairs).T
            ms = round(float(np.median(seconds)) * 1e3, 1)
            quarters = [round(float(np.median(part)), 3) for part in np.array_split(explained, 4)[1:]]
            print(f"{env:16}{name:42}{ms:8}   {quarters}", flush=True)
            rows.append([threads(), env, name, ms, *quarters])
    record("value_fits", "threads,env,fit,ms,second quarter,third quarter,last quarter", rows, args)


# ============================================================================ how far conjugate gradients come
SOLVES = [(True, 2), (True, 3), (True, 4), (True, 6), (True, 10), (False, 4), (False, 10), (False, 20)]


def solved(env, steps, every):
    """(policy or value, of SOLVES, share, seconds, cosine) of every so-manieth solve of a training run."""
    found, real, count = [], tm._solve_to_tol, itertools.count()

    def timed_solve(theta, b, *args):
        *args, damping, config = args

        def gain_of(**changes):
            start = time.perf_counter()
            x, *_, curvature = real(theta, b, *args, damping, config._replace(**changes))
            seconds = time.perf_counter() - start
            return x @ b - (curvature + damping * x @ x) / 2, seconds, x

        if next(count) // 2 % every == every - 1:
            most, _, exact = gain_of(cg_iters=300, cg_tol=1e-6)
            for precondition, cg_iters in SOLVES:
                changes = {"precondition": precondition, "cg_iters": cg_iters}
                gain, seconds, x = min((gain_of(**changes) for _ in range(3)), key=lambda each: each[1])
                cosine = x @ exact / np.linalg.norm(x) / np.linalg.norm(exact)
                found.append(
                    ("policy" if args[0][-1] > 1 else "value", (precondition, cg_iters), gain / most, seconds, cosine)
                )
        return real(theta, b, *args, damping, config)

    with unittest.mock.patch.object(tm, "_solve_to_tol", timed_solve):
        tm.train(env, tm.Config(total_steps=steps, stop_when_solved=False), seed=0)
    return found


def solves(args):
    """How far conjugate gradients come along training runs, preconditioned and plain, and how long that takes.

    How far: the share of the most that x . b - x^T (F + c I) x / 2 can be, which the solve maximises.
    """
    cases = (
        {"CartPole-v1": (10_000, 4)}
        if args.quick
        else {
            "CartPole-v1": (60_000, 8),
            "LunarLander-v3": (100_000, 12),
            "Hopper-v5": (100_000, 12),
            "HalfCheetah-v5": (200_000, 24),
        }
    )
    print(machine())
    print("\nmedians over a run: share of what the quadratic model can gain, cosine with its maximum, milliseconds")
    rows = []
    for env, (steps, every) in cases.items():
        found = solved(env, steps, every)
        for what, (precondition, cg_iters) in itertools.product(("policy", "value"), SOLVES):
            these = [each[2:] for each in found if each[:2] == (what, (precondition, cg_iters))]
            share, seconds, cosine = np.median(these, axis=0)
            kind = "preconditioned" if precondition else "plain"
            print(
                f"{env:16}{what:8}{kind:16}{cg_iters:3} iterations {share:8.3f} {cosine:8.3f} {seconds * 1e3:8.2f}",
                flush=True,
            )
            rows.append(
                [threads(), env, what, kind, cg_iters, round(share, 4), round(cosine, 4), round(seconds * 1e3, 3)]
            )
    record("solves", "threads,env,what,kind,cg_iters,share,cosine,ms", rows, args)


# ================================================================================================ single path and vine
SAMPLING = {"CartPole-v1": (100_000, (10, 30)), "Hopper-v5": (200_000, (20, 40))}  # steps, updates to compare at
KINDS = {"single_path": {}, "vine": {"sampling": "vine"}, "vine, 64 states": {"sampling": "vine", "vine_states": 64}}


def curve(env, kind, seed, total_steps, path):
    """Train once, then append a row for each update."""
    config, rows = tm.Config(num_envs=4, **KINDS[kind], total_steps=total_steps, stop_when_solved=False), []

    def callback(state, info, explained):
        mean = round(float(np.mean(state.returns)), 2) if state.returns else ""
        rows.append([env, kind, seed, state.steps, state.updates, mean])

    state = tm.train(env, config, seed=seed, callback=callback)
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows(rows)
    print(
        f"{env} {kind} seed {seed}: {np.mean(state.returns):.1f} after {state.steps:,} steps, {state.updates} updates",
        flush=True,
    )


def gradient_noise(env, kind, updates, seed, n=32):
    """Of n gradient estimates of one policy: E |g - mean|^2, |mean|^2 without bias, the environment steps of each."""
    state, sample = at_rest(env, tm.Config(num_envs=4, **KINDS[kind]), updates, seed)
    grads, steps = [], 0
    for _ in range(n):
        rollout, branches = sample()
        batch, *_ = tm._targets(state, rollout, branches, (), reward_scale(state))
        grads.append(tm.surrogate_grad(state.policy, state.theta, batch))
        steps += rollout.real.sum() + (branches.real.sum() if branches else 0)
    mean, variance = np.mean(grads, axis=0), np.var(grads, axis=0, ddof=1).sum()
    return variance, mean @ mean - variance / n, steps / n


def interpolated(rows, axis, grid):
    """The returns of each seed at the points of grid (seeds, points), along steps or updates."""
    out = []
    for seed in sorted({row["seed"] for row in rows}):
        points = [(float(row[axis]), float(row["return"])) for row in rows if row["seed"] == seed and row["return"]]
        x, y = np.array(points).T
        out.append(np.interp(grid, x, y, left=np.nan, right=np.nan))
    return np.array(out)


def sampling(args):
    """Single path and vine side by side: return against steps and updates, and the noise of the gradient."""
    path, noise_path = RESULTS / "sampling.csv", RESULTS / "sampling_noise.csv"
    for file, header in (
        (path, "env,sampling,seed,steps,updates,return"),
        (noise_path, "env,sampling,updates,seed,variance,squared mean,steps per gradient"),
    ):
        if not file.exists():
            file.write_text(header + "\n")
    print(machine())
    done = {tuple(row.values())[:3] for row in read_csv(path)}
    measured = {tuple(row.values())[:4] for row in read_csv(noise_path)}
    kinds = [(env, kind) for env in SAMPLING for kind in KINDS]
    for seed in range(args.seeds):
        for env, kind in kinds:
            total_steps, points = SAMPLING[env]
            if (env, kind, str(seed)) not in done:
                curve(env, kind, seed, total_steps, path)
            for updates in points:
                if (env, kind, str(updates), str(seed)) not in measured:
                    variance, squared_mean, steps = gradient_noise(env, kind, updates, seed)
                    with open(noise_path, "a") as file:
                        file.write(f'{env},"{kind}",{updates},{seed},{variance:.3e},{squared_mean:.3e},{steps:.0f}\n')
    rows, noise = read_csv(path), read_csv(noise_path)
    for env, (total_steps, points) in SAMPLING.items():
        print(f"\n{env}: mean and deviation of the return over {args.seeds} seeds")
        for kind in KINDS:
            mine = [row for row in rows if (row["env"], row["sampling"]) == (env, kind)]
            for axis, grid in (
                ("steps", [total_steps // 4, total_steps // 2, total_steps - 6000]),
                ("updates", points),
            ):
                y = interpolated(mine, axis, grid)
                cells = (
                    f"{m:7.1f} +- {d:<6.1f}"
                    for m, d in zip(y.mean(axis=0), y.std(axis=0, ddof=min(1, len(y) - 1)), strict=True)
                )
                print(f"  {kind:15} at {axis} {', '.join(f'{x:,}' for x in grid):24} {' '.join(cells)}")
            for updates in points:
                mine = [r for r in noise if tuple(r.values())[:3] == (env, kind, str(updates))]
                variance, square, steps = np.mean([[float(x) for x in tuple(r.values())[4:]] for r in mine], axis=0)
                print(
                    f"  {kind:15} gradient, {updates} updates: variance {variance:.2e}, squared mean {square:.1e}, "
                    f"ratio {variance / square:.1f}; {steps:,.0f} steps"
                )
    draw_sampling(rows)


def draw_sampling(rows):
    """results/sampling.png: the mean over seeds and its deviation."""
    figure, axes = figures(2, 2, figsize=(9, 6))
    for i, env in enumerate(SAMPLING):
        for j, axis in enumerate(("steps", "updates")):
            for kind, colour in zip(KINDS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
                mine = [row for row in rows if (row["env"], row["sampling"]) == (env, kind)]
                last = min(
                    max(float(row[axis]) for row in mine if row["seed"] == seed)
                    for seed in {row["seed"] for row in mine}
                )
                grid = np.linspace(0, last, 200)
                y = interpolated(mine, axis, grid)
                mean, deviation = y.mean(axis=0), y.std(axis=0, ddof=min(1, len(y) - 1))
                axes[i, j].plot(grid, mean, color=colour, label=kind)
                axes[i, j].fill_between(grid, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
            axes[i, j].set(
                xlabel="environment steps" if axis == "steps" else "policy updates", ylabel="return", title=env
            )
    axes[0, 0].legend()
    figure.savefig(RESULTS / "sampling.png", dpi=120)


# ============================================================================================= faults put in on purpose
def spans(folder, names):
    """The first and last line of each of these functions."""
    tree = ast.parse((folder / "trpo_min.py").read_text())
    lines = {node.name: (node.lineno, node.end_lineno) for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name: lines[name] for name in names}


def mutants_of(settings, names, folder):
    """A process that tries the mutants of these functions, on a copy of the project in folder, and keeps a database."""
    alone = {"NUMBA_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1", "HYPOTHESIS_PROFILE": "quick"}
    quiet = {"cwd": folder, "env": os.environ | alone, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not (folder / "s.db").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("trpo_min.py", "test_trpo_min.py", "pyproject.toml"):
            shutil.copy(HERE / name, folder)
        shutil.copy(HERE / "trpo_min.py", folder / "without_fault.py")
        lines = [f"{first}-{last}" for first, last in spans(folder, names).values()]
        config = {
            "module-path": "trpo_min.py",
            "timeout": 300.0,
            "excluded-modules": [],
            "test-command": settings["test-command"],
            "distributor": {"name": "local"},
            "filters": {
                "line-filter": {"lines": {"trpo_min.py": lines}},
                "operators-filter": {"exclude-operators": settings["exclude-operators"]},
            },
        }
        (folder / "c.toml").write_text(toml().dumps({"cosmic-ray": config}))
        commands = (
            "cosmic-ray init c.toml new.db; cr-filter-lines --config c.toml new.db; cr-filter-operators new.db c.toml; "
            "cosmic-ray baseline c.toml"  # fails where the tests do without a fault, which would count as finding all
        )
        for command in commands.split("; "):
            subprocess.run(command.split(), check=True, **quiet)
        (folder / "new.db").rename(folder / "s.db")
    shutil.copy(folder / "without_fault.py", folder / "trpo_min.py")
    return subprocess.Popen(["cosmic-ray", "exec", "c.toml", "s.db"], **quiet)


def toml():
    import toml  # cosmic-ray needs it too

    return toml


def mutation(args):
    """The share of small faults in the mathematics that the tests find; survivors go to results/mutants.csv.

    What was tried is kept in the folder .mutants, and a run that was cut short goes on from there; delete it to start
    anew, and after each change of the code.
    """
    settings = toml().loads((HERE / "pyproject.toml").read_text())["tool"]["trpo-min"]["mutation"]
    names, path, reasons, survivors = settings["functions"], RESULTS / "mutants.csv", {}, []
    folders = [HERE / ".mutants" / str(i) for i in range(args.workers)]
    if path.exists():
        reasons = {(row["function"], row["was"], row["became"]): row["reason"] for row in read_csv(path)}
    processes = [mutants_of(settings, names[i :: len(folders)], folder) for i, folder in enumerate(folders)]
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:  # report what there is
        for process in processes:
            process.terminate()
            process.wait()
    tried = pending = 0
    for folder in folders:
        base = sqlite3.connect(folder / "s.db")
        pending += base.execute(
            "select count(*) from work_items where job_id not in (select job_id from work_results)"
        ).fetchone()[0]
        query = (
            "select start_pos_row, test_outcome, diff from mutation_specs join work_results using (job_id) "
            "where worker_outcome != 'SKIPPED'"
        )
        for line, outcome, diff in base.execute(query):
            tried += 1
            if "SURVIVED" in outcome:
                parts = ([x[1:].strip() for x in diff.splitlines() if x[:1] == s and x[:3] != s * 3] for s in "-+")
                function = next(name for name, (a, b) in spans(folder, names).items() if a <= line <= b)
                survivors.append((function, *("; ".join(part) for part in parts)))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["function", "was", "became", "reason"])
        writer.writerows([*key, reasons.get(key, "")] for key in sorted(survivors))
    explained, killed = sum(bool(reasons.get(key)) for key in survivors), tried - len(survivors)
    print(machine())
    print(
        f"{tried} of {tried + pending} mutants tried, {killed} killed; {len(survivors)} survive, {explained} explained"
    )
    print(f"score {killed / tried:.1%}, of those that change behaviour {killed / (tried - explained):.1%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    repeated = {fvp: 51, update: 50, train: 5, start: 3, scaling: 21, scale: 21}
    for run in (fvp, update, train, solve, start, scaling, scale, install, fits, solves, bound, environments, soak):
        command = commands.add_parser(run.__name__, help=run.__doc__)
        if run in repeated:
            command.add_argument("--repeats", type=int, default=repeated[run], help="calls or runs that a median is of")
        command.add_argument("--quick", action="store_true", help="smaller, under a minute; writes nothing")
        command.set_defaults(run=run)
        if run is soak:
            command.add_argument("--minutes", type=float, default=60, help="how long (default: 60)")
        if run is solve:
            command.add_argument("--seeds", type=int, default=10, help="seeds 0 to N - 1 (default: 10)")
    command = commands.add_parser("learn", help=learn.__doc__)
    command.add_argument("env", nargs="*", help="Gymnasium ids (default: nine of MuJoCo)")
    command.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 (default: 5)")
    command.add_argument("--total-steps", type=tm.integer, default=10**6, help="environment steps (default: 1e6)")
    command.add_argument("--every", type=int, default=50_000, help="steps between evaluations (default: 50,000)")
    command.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings other than the defaults")
    command.add_argument("--who", choices=["ours", "sb3-contrib"], default="ours", help="whose TRPO (default: ours)")
    command.add_argument("--workers", type=int, default=2, help="processes; give each one thread (default: 2)")
    command.add_argument("--out", type=Path, help="CSV to append to (default: results/learn.csv)")
    command.add_argument("--plot", action="store_true", help="draw results/learn.png too")
    command.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    command.set_defaults(run=learn)
    command = commands.add_parser("sampling", help=sampling.__doc__)
    command.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 (default: 5)")
    command.set_defaults(run=sampling)
    command = commands.add_parser("mutation", help=mutation.__doc__)
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: the cores)")
    command.set_defaults(run=mutation)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
