import time, torch, json
from lora_squeeze.demo.model import find_model, load_model
from lora_squeeze.demo.settings import Settings
from lora_squeeze.demo.task import *
from lora_squeeze.demo.train import attach_lora, train
from lora_squeeze.training.statistics import Statistics
torch.set_num_threads(1)
dev=torch.device("cpu")
folder=find_model(); model,tok=load_model(folder,dev)
st=Settings(model=folder.origin,seed=0,steps=80)
tr,ho=split_words(read_words(),0)
data=list(batches(take(tr,tok,st.steps*st.batch),st.batch))
m=attach_lora(model,st)
stats=Statistics(m,"default")
t=time.time()
def rep(s,l):
    stats.step(); print(s,round(l,3),round(time.time()-t,1),flush=True)
losses=train(m,data,st,dev,rep)
stats.close()
m.save_pretrained("adapter")
torch.save(stats.state_dict(),"stats.pt")
