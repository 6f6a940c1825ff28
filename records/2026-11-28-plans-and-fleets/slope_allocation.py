import sys, tempfile, torch, math
from pathlib import Path
from bench.training import train
from bench.training_tasks import TASKS, evaluate
from bench.prediction import _asked, _mean
from lora_squeeze.hub import load
from lora_squeeze import moments as M
from lora_squeeze import data_aware
from lora_squeeze.decompose import gram_of_columns
from lora_squeeze.training.calibration import factors_of
from lora_squeeze.training.statistics import calibrate
from lora_squeeze.fleet.choose import _descending
name, steps, seeds = sys.argv[1], int(sys.argv[2]), [int(x) for x in sys.argv[3].split(',')]
def slopes(update, mo, share=M.SHRINKAGE):
    G,H=(gram_of_columns(X[None])[0] for X in (update.B, update.A.mT))
    C,F=mo.C.to(G),mo.F.to(G)
    rG,iG=M._root(G); rH,iH=M._root(H); core=rG.mT@rH
    rC,iC=M._weight(iH@C@iH.mT, core.mT, share); rF,iF=M._weight(iG@F@iG.mT, core, share)
    U,S,Vh=torch.linalg.svd(rF.mT@core@rC)
    a=iG.mT@iF.mT@(U*S); b=Vh@iC@iH
    return -((a.mT@mo.slope.to(G))*b).sum(-1)   # contribution of cutting direction i
def spectra(ad, mo, kind):
    out={}
    for n,m in ad.modules.items():
        sec=[s*s for s in data_aware._values(m,mo[n])[0]]
        sl=slopes(ad.update(n),mo[n]).tolist()
        if kind=='signed': g=[a+b for a,b in zip(sec,sl)]
        elif kind=='abs': g=[a+abs(b) for a,b in zip(sec,sl)]
        elif kind=='pos': g=[a+max(b,0) for a,b in zip(sec,sl)]
        else: g=sec
        out[n]=[[math.sqrt(x) for x in _descending(g)]]
    return out
orig=data_aware.loss_spectra
task=TASKS[name](held=int(sys.argv[4])) 
for seed in seeds:
    model,_,_=train(task,64,steps,5e-4,seed); asked=_asked(task,seed); model.eval(); held=task.held_out()
    with tempfile.TemporaryDirectory() as f:
        model.save_pretrained(f); ad=load(Path(f))
        raw=calibrate(model,asked,loss=task.loss); mo=data_aware.moments_of(ad,raw)
        base=_mean(task,model,asked); bh=evaluate(task,model,held)['loss']
        for kind in ('second','signed','abs','pos'):
            data_aware.loss_spectra=lambda a,m,p: spectra(ad,mo,kind)
            for rank in (8,4,2,1):
                sm=ad.squeeze(rank=rank,allocate='global',moments=mo)
                with factors_of(model,sm): x=_mean(task,model,asked)-base; h=evaluate(task,model,held)['loss']-bh
                pr=sm.report.loss_increase
                print(name,seed,kind,rank,'asked %.4f held %.4f pred %.4f left %d'%(x,h,pr,len(sm.dropped)),flush=True)
