"""Every number that the README shows, each by one sub-command.

    OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python bench.py fvp       the Fisher-vector product
    python bench.py learn CartPole-v1 --seeds 20                        learning, a row a seed, appended to results/

Each sub-command checks first that what it compares gives the same numbers.  Times are medians of --repeats calls in
this process, with the spread from the first to the third quartile.  `pip install ".[bench,mujoco]"` has all it needs.
"""

import argparse
import ast
import csv
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import scipy

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
        f"{name}, {os.cpu_count()} cores; Numba threads {numba.get_num_threads()}, BLAS threads {blas}; "
        f"Python {platform.python_version()}, NumPy {np.__version__}, Numba {numba.__version__}, "
        f"SciPy {scipy.__version__}; {time.strftime('%Y-%m-%d')}"
    )


def timed(function, repeats):
    """Median and quartiles of the seconds that function takes."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return np.percentile(seconds, [50, 25, 75])


def milliseconds(quantiles):
    return f"{quantiles[0] * 1e3:9.3f} ({quantiles[1] * 1e3:.3f}-{quantiles[2] * 1e3:.3f})"


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
    """F v alone on cached activations, as inside conjugate gradients."""
    acts = tm._activations(theta, np.array(policy.sizes), obs)
    fisher = tm._fisher(policy, theta, acts)

    def product(v):
        with tm._one_blas_thread():
            return tm._fvp(theta, v, *fisher, 0.0)

    return product


def compile_seconds():
    """From the first call of F v to its result, in a process of its own with an empty Numba cache."""
    script = (
        "import bench, numpy as np, time; policy, theta, obs, v, _ = bench.fisher_case((3, 4, 2), 5, np.float64); "
        "start = time.perf_counter(); bench.kernel(policy, theta, obs)(v); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "NUMBA_CACHE_DIR": cache}
        return float(subprocess.run([sys.executable, "-c", script], env=env, cwd=HERE, capture_output=True).stdout)


def fvp(args):
    """Parity, compile time, then F v against whole-batch NumPy, the empirical form and the dense matrix."""
    print(machine())
    policy, theta, obs, v, rng = fisher_case((4, 8, 2), 200, np.float64)
    exact = tm.fvp(policy, theta, obs, v)
    acts = numpy_activations(policy, theta, obs)
    S = score_rows(policy, theta, acts, tm.sample(policy, tm.forward(policy, theta, obs), rng))
    print("\nparity, largest relative difference from F v on 4-8-2, 200 rows:")
    print(f"  whole-batch NumPy {np.abs(numpy_fvp(policy, theta, acts, v) - exact).max() / np.abs(exact).max():.1e}")
    print(f"  dense matrix      {np.abs(dense_fisher(policy, theta, obs) @ v - exact).max() / np.abs(exact).max():.1e}")
    many = np.repeat(obs, 500, axis=0)
    acts = numpy_activations(policy, theta, many)
    S = score_rows(policy, theta, acts, tm.sample(policy, tm.forward(policy, theta, many), rng))
    error = np.abs(S.T @ (S @ v) / len(many) - exact).max() / np.abs(exact).max()
    print(f"  empirical form    {error:.1e} from 500 actions a state: it is an estimate, 1/sqrt(actions)")

    print(f"\ncompiling F v in a new process with an empty cache: {compile_seconds():.1f} s")

    print("\nF v, milliseconds, median (quartiles); the network 11-64-64-3 of Hopper, 5,126 parameters")
    print("  rows   type     ours                     whole-batch NumPy        ratio   empirical, stored scores")
    for n_rows in (512, 2048) if args.quick else (512, 2048, 16384):
        for dtype in (np.float64, np.float32):
            policy, theta, obs, v, rng = fisher_case((11, 64, 64, 3), n_rows, dtype)
            product, acts = kernel(policy, theta, obs), numpy_activations(policy, theta, obs)
            ours = timed(lambda product=product, v=v: product(v), args.repeats)
            whole = timed(lambda p=policy, t=theta, a=acts, v=v: numpy_fvp(p, t, a, v), args.repeats)
            stored = "-" * 5
            if n_rows <= 2048:
                S = score_rows(policy, theta, acts, tm.sample(policy, tm.forward(policy, theta, obs), rng))
                stored = milliseconds(timed(lambda S=S, v=v: S.T @ (S @ v) / len(S), args.repeats))
            ratio = whole[0] / ours[0]
            print(
                f"{n_rows:6} {np.dtype(dtype).name}  {milliseconds(ours):24} {milliseconds(whole):24} "
                f"{ratio:5.2f}x  {stored}"
            )

    print("\ngrowth with the number of parameters P, float64, 512 rows: 11-H-H-3")
    print("     H        P   ours ms   per 1000 P   dense F v ms   per P^2 x 1e-6   dense F, MB   forming F, s")
    points = []
    for hidden in (8, 16, 32) if args.quick else (8, 16, 32, 64, 128, 256):
        policy, theta, obs, v, _ = fisher_case((11, hidden, hidden, 3), 512, np.float64)
        P = len(theta)
        ours = timed(lambda f=kernel(policy, theta, obs), v=v: f(v), args.repeats)[0]
        dense = forming = np.nan
        if P <= 6000:
            start = time.perf_counter()
            F = dense_fisher(policy, theta, obs)
            forming = time.perf_counter() - start
            dense = timed(lambda F=F, v=v: F @ v, args.repeats)[0]
        points.append((P, ours, dense))
        print(
            f"{hidden:6} {P:8,} {ours * 1e3:9.3f} {ours * 1e6 / P:12.4f} {dense * 1e3:14.3f} "
            f"{dense * 1e9 / P**2:16.3f} {P * P * 8 / 1e6:13.1f} {forming:14.2f}"
        )
    P, ours, dense = np.log(np.array(points)).T
    known = np.isfinite(dense)
    print(
        f"log-log slope against P: ours {np.polyfit(P[-3:], ours[-3:], 1)[0]:.2f} over the last three sizes, ", end=""
    )
    print(f"dense {np.polyfit(P[known], dense[known], 1)[0]:.2f} (2, and more where F leaves a cache)")


# ============================================================================================================ learning
def learn(args):
    """Train once a seed and append a row each; then the mean and the spread over the seeds."""
    RESULTS.mkdir(exist_ok=True)
    path, rows = args.out or RESULTS / "learn.csv", []
    config = tm.Config(total_steps=args.total_steps, stop_when_solved=args.stop_when_solved)
    for seed in range(args.seeds):
        start = time.perf_counter()
        state = tm.train(args.env, config, seed=seed)
        row = {
            "env": args.env,
            "seed": seed,
            "steps": state.steps,
            "episodes": state.episodes,
            "solved": state.solved,
            "return": round(float(np.mean(state.returns)), 2),
            "seconds": round(time.perf_counter() - start, 1),
            "config": " ".join(f"{k}={v}" for k, v in config._asdict().items()),
            "versions": machine(),
        }
        new = not path.exists()
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        rows.append(row)
        print(
            f"{args.env} seed {seed}: return {row['return']} after {row['steps']:,} steps, {row['seconds']} s",
            flush=True,
        )
    returns, steps = ([row[k] for row in rows] for k in ("return", "steps"))
    solved = sum(row["solved"] for row in rows)
    spread = np.std(returns, ddof=1) if len(rows) > 1 else np.nan
    print(f"{args.env}: last 100 episodes {np.mean(returns):.1f} +- {spread:.1f} (n={len(rows)}, min {min(returns)})")
    print(f"  solved {solved}/{len(rows)}; steps: median {np.median(steps):,.0f}, largest {max(steps):,}")


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
    state, sample = at_rest("CartPole-v1", tm.Config(), 20)
    batch, *_ = tm._targets(state, *sample(), reward_scale(state))
    gamma, found = state.config.gamma, []
    print(machine())
    print("\none update on CartPole-v1 after 20, stopped at different KL; in units of the scaled return")
    print("  max_kl   largest KL    step length   surrogate gain   penalty of E11   lower bound")
    for exponent in np.arange(-2, -17, -0.25):
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


# ================================================================================================ single path and vine
SAMPLING = {"CartPole-v1": (100_000, (10, 30)), "Hopper-v5": (200_000, (20, 40))}  # steps, updates to compare at
KINDS = {"single_path": {}, "vine": {"sampling": "vine"}, "vine, 64 states": {"sampling": "vine", "vine_states": 64}}


def curve(env, kind, seed, total_steps, path):
    """Train once, then append a row for each update."""
    config, rows = tm.Config(**KINDS[kind], total_steps=total_steps, stop_when_solved=False), []

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
    state, sample = at_rest(env, tm.Config(**KINDS[kind]), updates, seed)
    grads, steps = [], 0
    for _ in range(n):
        rollout, branches = sample()
        batch, *_ = tm._targets(state, rollout, branches, reward_scale(state))
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


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def draw_sampling(rows):
    """results/sampling.png: the mean over seeds and its deviation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
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
    quiet = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
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
            "cosmic-ray init c.toml new.db; cr-filter-lines --config c.toml new.db; cr-filter-operators new.db c.toml"
        )
        for command in commands.split("; "):
            subprocess.run(command.split(), check=True, **quiet)
        (folder / "new.db").rename(folder / "s.db")
    shutil.copy(folder / "without_fault.py", folder / "trpo_min.py")
    alone = {"OPENBLAS_NUM_THREADS": "1", "NUMBA_DISABLE_JIT": "1", "HYPOTHESIS_PROFILE": "quick"}
    return subprocess.Popen(["cosmic-ray", "exec", "c.toml", "s.db"], env=os.environ | alone, **quiet)


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
    command = commands.add_parser("fvp", help=fvp.__doc__)
    command.add_argument("--repeats", type=int, default=51, help="calls that a median is taken of (default: 51)")
    command.add_argument("--quick", action="store_true", help="smaller sizes, under a minute")
    command.set_defaults(run=fvp)
    command = commands.add_parser("learn", help=learn.__doc__)
    command.add_argument("env", help="Gymnasium id")
    command.add_argument("--seeds", type=int, default=5, help="seeds 0 to N - 1 (default: 5)")
    command.add_argument("--total-steps", type=int, default=200_000, help="environment steps (default: 200,000)")
    command.add_argument("--stop-when-solved", action="store_true", help="stop at the reward threshold")
    command.add_argument("--out", type=Path, help="CSV to append to (default: results/learn.csv)")
    command.set_defaults(run=learn)
    commands.add_parser("bound", help=bound.__doc__).set_defaults(run=bound)
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
