"""Two GPUs: preflight, NCCL exactness, a hang, a signal, a killed rank."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
import torch
from lhcp import config_file
from lhcp.metrics import read_metrics
from runs import make_config, write_data
OUT = Path(os.environ["OUT"]); W = Path("/tmp/x2"); W.mkdir(exist_ok=True)
data = write_data(W)
results = {"gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], "torch": torch.__version__}
N = torch.cuda.device_count()
def save(): (OUT / "x2.json").write_text(json.dumps(results, indent=1))
MODEL64 = {"vocab_size": 257, "dim": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_dim": 192}
def config(name, dp, cp, **changes):
    values = dict(output_dir=W / name, eval={}, device="cuda", seq_len=1440, model=MODEL64, global_batch_size=4)
    c = make_config(data, dp, cp, **(values | changes))
    p = W / f"{name}.yaml"; p.unlink(missing_ok=True); config_file.save(c, p); return p
def command(path, n, *more):
    return [sys.executable, "-m", "lhcp.agent", "--standalone", f"--nproc-per-node={n}", "-m", "lhcp.train", str(path), *more]
def run(path, n, *more, act=None):
    log = open(W / f"{path.stem}.out", "a")
    t = time.time(); p = subprocess.Popen(command(path, n, *more), stdout=log, stderr=log)
    if act: act(p)
    code = p.wait(timeout=150); return code, round(time.time() - t, 1)
def losses(name): return [r["loss"] for r in read_metrics(W / name)]
def wait_step(name, step, limit=90):
    end = time.time() + limit
    while time.time() < end:
        try:
            if read_metrics(W / name)[-1]["step"] >= step: return
        except Exception: pass
        time.sleep(0.05)
    raise TimeoutError(name)
def ranks(pid):
    out = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [int(l.split()[0]) for l in out.splitlines() if " -u -m lhcp.train " in l and "lhcp.agent" not in l]
def section(f):
    t = time.time()
    try: f()
    except Exception as e:
        import traceback; traceback.print_exc(); results[f.__name__] = {"error": repr(e)}
    print(f.__name__, round(time.time() - t, 1), json.dumps(results.get(f.__name__))[:1500], flush=True); save()
def preflight():
    r = subprocess.run([sys.executable, "-m", "lhcp.agent", "--standalone", f"--nproc-per-node={N}", "-m", "lhcp.preflight", "--out", str(OUT / "preflight")], capture_output=True, text=True)
    results["preflight"] = {"code": r.returncode, "out": r.stdout, "err": r.stderr[-1500:]}
def exactness():
    res = {}
    for dtype, kw in {"float64": {}, "bfloat16": {"dtype": "float32", "compute_dtype": "bfloat16"}}.items():
        base = None
        for dp, cp in [(1, 1), (1, N), (N, 1)]:
            name = f"{dtype}-{dp}-{cp}"
            code = run(config(name, dp, cp, **kw), dp * cp)
            l = losses(name)
            base = base or l
            res[name] = {"code": code, "last": l[-1], "steps": len(l), "max_rel": max(abs(a - b) / abs(b) for a, b in zip(l, base))}
    results["exactness"] = res
def hang():
    stages = [{"mode": "lighthouse", "steps": 4000}]
    path = config("hang", 1, N, dtype="float32", compute_dtype="bfloat16", stages=stages, hang_timeout_s=15, eval={}, checkpoint={"every": 20})
    at = {}
    def act(p):
        wait_step("hang", 25); (pid,) = ranks(p.pid)[1:2]; os.kill(pid, signal.SIGSTOP); at["t"] = time.time()
    def full(p):
        act(p)
        zero = ranks(0)[0]
        while Path(f"/proc/{zero}").exists() and open(f"/proc/{zero}/stat").read().split()[2] != "Z": time.sleep(0.1)
        at["rank0_gone"] = time.time()
        while ranks(0): time.sleep(0.1)
        at["ranks_gone"] = time.time()
    code = run(path, N, act=full)
    at["end"] = time.time()
    at |= {f.name: f.stat().st_mtime for f in (W / "hang/logs").iterdir()}
    results["hang_times"] = {k: round(v - at["t"], 1) for k, v in at.items()}
    print(results["hang_times"])
    files = {f.name: f.stat().st_size for f in (W / "hang/logs").iterdir()}
    out = (W / "hang.out").read_text()
    stack = (W / "hang/logs/hang-rank-00000.txt").read_text()
    results["hang"] = {"code": code, "after_stop_s": round(time.time() - at["t"], 1), "files": files, "said": out[-1500:], "stack": stack[-2500:]}
    trace = W / "hang/logs/nccl_trace_rank_0"
    if trace.exists():
        import pickle
        d = pickle.loads(trace.read_bytes())
        results["hang"]["trace"] = {"keys": list(d), "entries": len(d.get("entries", [])), "last": [{k: str(e.get(k)) for k in ("profiling_name", "state", "collective_seq_id", "p2p_seq_id")} for e in d.get("entries", [])[-4:]]}
    for pid in ranks(0): os.kill(pid, signal.SIGKILL)
def told():
    stages = [{"mode": "lighthouse", "steps": 10}, {"mode": "dense", "steps": 10}]
    kw = dict(dtype="float32", compute_dtype="bfloat16", deterministic=True, stages=[{"mode": "lighthouse", "steps": 300}, {"mode": "dense", "steps": 60}], eval={}, checkpoint={"every": 50})
    whole = run(config("whole", 1, N, **kw), N)
    path = config("told", 1, N, **kw)
    a = run(path, N, act=lambda p: (wait_step("told", 120), os.kill(p.pid, signal.SIGUSR1)))
    n1 = len(losses("told"))
    b = run(path, N, "--resume", "last", act=lambda p: (wait_step("told", 220), os.kill(ranks(p.pid)[1], signal.SIGKILL)))
    n2 = len(losses("told"))
    c = run(path, N, "--resume", "last")
    results["told"] = {"whole": whole, "usr1": a, "steps": n1, "killed": b, "steps2": n2, "again": c, "same": losses("told") == losses("whole"), "out": (W / "told.out").read_text()[-600:]}
for f in (exactness, told, hang): section(f)
