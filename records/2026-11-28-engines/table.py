import json,statistics as st,sys
for f in sys.argv[1:]:
    rows=[json.loads(l) for l in open(f)][1:]
    by={(r["limit"],r["adapters"]):r for r in rows}
    print(f,[round(r["load"],1) for r in rows], [len(r["repeats"]) for r in rows])
    for n in (1,4,16):
        for l in (64,8):
            r=by[l,n]; w=[x["seconds"] for x in r["repeats"]]; p=[x["processor_seconds"] for x in r["repeats"]]
            print(n,l,"wall",round(st.median(w),1),round(min(w),1),round(max(w),1),"tok/s",round(256/st.median(w),1),"req/s",round(16/st.median(w),2),"cpu",round(st.median(p),1),round(min(p),1),round(max(p),1),"res GB",round(r["resident_bytes"]/1e9,3))
        g=lambda l,k:[x[k] for x in by[l,n]["repeats"]]
        for k in ("seconds","processor_seconds"):
            q=[x/y for x in g(64,k) for y in g(8,k)]
            print("  ratio",k,round(st.median(g(64,k))/st.median(g(8,k)),2),round(min(q),2),round(max(q),2))
        print("  mem",round((by[64,n]["resident_bytes"]-by[8,n]["resident_bytes"])/1e6),"rule",round((by[64,n]["slot_bytes_by_rule"]-by[8,n]["slot_bytes_by_rule"])/1e6))
