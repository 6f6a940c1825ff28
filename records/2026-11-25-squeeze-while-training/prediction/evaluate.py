import time, torch, json, sys
from peft import PeftModel
from torch.nn.functional import cross_entropy
from lora_squeeze.demo.model import find_model, load_model
from lora_squeeze.demo.settings import Settings
from lora_squeeze.demo.task import *
from lora_squeeze.demo.train import completion_logits
from lora_squeeze.demo.evaluate import evaluate
from lora_squeeze.training.statistics import Statistics, calibrate
from lora_squeeze.training.live import live_modules
from lora_squeeze.decompose import gram_of_columns
from lora_squeeze.moments import *
torch.set_num_threads(1)
dev=torch.device("cpu")
folder=find_model(); base,tok=load_model(folder,dev)
m=PeftModel.from_pretrained(base,"adapter")
tr,ho=split_words(read_words(),0)
train_b=list(batches(take(tr,tok,1600),20))
test=list(batches(take(ho,tok,120),20))
same=train_b[:3]
def loss(model,b):
    return cross_entropy(completion_logits(model,b).flatten(0,1),b.labels.flatten(),ignore_index=IGNORED)
t=time.time()
cal=calibrate(m,train_b[-8:],loss=loss); print("calibrate 8 batches",time.time()-t,flush=True)
st=Statistics(m,"default"); st.load_state_dict(torch.load("stats.pt",weights_only=True)); run=st.moments(); st.close()
print("rows",next(iter(cal.values())).rows,next(iter(run.values())).rows, "unseen", len(st.unseen))
mods=live_modules(m,"default")
orig={x.path:(x.A.detach().clone(),x.B.detach().clone()) for x in mods}
GH={p:(gram_of_columns(B[None])[0],gram_of_columns(A.mT[None])[0]) for p,(A,B) in orig.items()}
def score(data): return evaluate(m,data,dev,"float32",lambda:None)
def put(k,l,two,stats):
    inc=0.; 
    for x in mods:
        A,B=orig[x.path]; P,R,v=weighted_truncation(stats[x.path],*GH[x.path],k,shrinkage=l,two_sided=two)
        inc+=float(predicted_increase(cal[x.path],x.scale,P,R))
        with torch.no_grad():
            x.A.zero_(); x.B.zero_(); x.A[:k]=(R@A.double()).float(); x.B[:,:k]=(B.double()@P).float()
    return inc
s0=score(test); s1=score(same)
print("full  test %.4f acc %.3f train %.4f"%(s0.loss,s0.token_accuracy,s1.loss),flush=True)
for k in (1,4,16):
    for name,l,two,stats in [("plain",1.,True,cal)]+[("cal2",l,True,cal) for l in (0.,.01,.05,.2,.5)]+[("cal1",l,False,cal) for l in (0.,.05)]+[("run2",l,True,run) for l in (.01,.05,.2)]+[("run1",.05,False,run)]:
        inc=put(k,l,two,stats); a=score(test); b=score(same) if l in(1.,.05) and stats is cal else None
        print("k=%d %s l=%.2f two=%d test %.4f (+%.4f) acc %.3f train %s predicted +%.4f  %.0fs"%(k,name,l,two,a.loss,a.loss-s0.loss,a.token_accuracy,"+%.4f"%(b.loss-s1.loss) if b else "-",inc,time.time()-t),flush=True)
