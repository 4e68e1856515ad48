import sys, torch, time
from dit_accel_eval.runs.loaded import EmbeddedModel
name, steps, shift, first, count = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) or None, int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(1)
m = EmbeddedModel(name, {})
tr = m.transformers[0]
blocks = list(tr.blocks) if hasattr(tr,'blocks') else [*tr.transformer_blocks, *tr.single_transformer_blocks]
rec=[]; cur={}
def pick(o, i):
    return o
def pre(mod, args, kwargs):
    cur['x']=(kwargs.get('hidden_states') if 'hidden_states' in kwargs else args[0]).clone()
    t=kwargs.get('timestep'); cur['t']=float(t.flatten()[0])
def post(mod, args, kwargs, out):
    o = out[0] if isinstance(out,tuple) else out.sample
    rec.append(dict(x=cur['x'],t=cur['t'],v=o.clone(),a=cur['a'],b=cur['b']))
def bin(mod,args,kwargs):
    h = kwargs.get('hidden_states', args[0] if args else None); cur['a']=h.clone()
def bout(mod,args,kwargs,out):
    o = out[-1] if isinstance(out,tuple) else out; cur['b']=o.clone()
tr.register_forward_pre_hook(pre, with_kwargs=True); tr.register_forward_hook(post, with_kwargs=True)
blocks[1].register_forward_pre_hook(bin, with_kwargs=True); blocks[-2].register_forward_hook(bout, with_kwargs=True)
out=[]
for clip in range(first, first+count):
    rec.clear(); t0=time.time()
    kw = {} if shift is None else {'flow_shift':shift}
    r=m.run(clip, steps=steps, solver='unipc', **kw)
    print(clip, len(rec), time.time()-t0, rec[0]['x'].shape, rec[0]['v'].shape, rec[0]['a'].shape, [round(q['t'],4) for q in rec[::2]][:6], flush=True)
    br=len(rec)//steps
    out.append([{k:(torch.stack([q[k] for q in rec[i*br:(i+1)*br]]).half() if k in 'ab' else torch.stack([q[k] for q in rec[i*br:(i+1)*br]]) if k!='t' else rec[i*br]['t']) for k in 'xvtab'} for i in range(steps)])
torch.save(out, f'forecast-errors/{name}-{steps}-{shift}-{first}.pt')
