import sys, torch, numpy as np
from importlib.machinery import SourceFileLoader
o=SourceFileLoader('o',__file__.replace('open2','open')).load_module()
X,U,N,R=o.X,o.U,o.N,o.R
name=sys.argv[1]
def blockres():
    D=o.D; B=torch.stack([torch.stack([D[c][i]['b'].float()-D[c][i]['a'].float() for i in range(N)]) for c in range(len(D))])
    return B[:,:,0].squeeze(2) # cond branch: clips, steps, tokens, dim
del_cost=None
def study(Z, what, chan, fftdims, R):
    # chan: index of channel axis in per-sample tensor
    tr,te=slice(0,4),slice(4,8)
    M=((2,6),(3,6),(4,6))
    res={}
    def add(n,m,e): res.setdefault(n,{})[m]=res.get(n,{}).get(m,[])+[e]
    axis=chan
    other=[d for d in range(1,Z[:,0].ndim) if d!=axis]
    dims=tuple(range(1,Z[:,0].ndim))
    low=(R<=.25)
    for m,w in M:
        k=o.patt(m,w); known=[j for j in range(N) if k[j]]
        P={}
        def preds(ks,at,src=None):
            t=[o.var['lsnr'](j) for j in ks]; s=[float(j) for j in ks]
            W={'hold':[0.]*(len(ks)-1)+[1.],'t1':o.taylor(s,float(at),1),'damp':o.taylor(s,float(at),1,.25),'half':o.taylor(s,float(at),1,.5),'lsnr':o.taylor(t,o.var['lsnr'](at),1),'t2':o.taylor(s,float(at),2)}
            return {n:sum(a*Z[:,j] for a,j in zip(ww,ks) if a) for n,ww in W.items()}
        allp={}
        for i in range(N):
            if k[i] : continue
            allp[i]=preds([j for j in known if j<i],i)
        names=list(next(iter(allp.values())))
        pool=[n for n in names]
        # HyCa offline: best of the pool per channel over clips 0-3
        E={n:sum((allp[i][n][tr]-Z[tr,i]).pow(2).sum([0,*other]) / Z[tr,i].pow(2).sum() for i in allp) for n in pool}
        best=torch.stack([E[n] for n in pool]).argmin(0)
        # a, b shared: hold + a (t1-hold) + b (t2-t1), over clips 0-3
        G=torch.zeros(2,2).double(); r=torch.zeros(2).double()
        for i in allp:
            p=allp[i]; A=torch.stack([(p['t1']-p['hold'])[tr].flatten(),(p['t2']-p['t1'])[tr].flatten()]).double(); b=(Z[tr,i]-p['hold'][tr]).flatten().double(); s=1/Z[tr,i].pow(2).sum().double()
            G+=A@A.T*s; r+=A@b*s
        ab=torch.linalg.solve(G,r); a1=(r[0]/G[0,0]).item()
        print(what,m,'fit a,b',ab.tolist(),'a alone',a1,'hyca counts',[(n,int((best==q).sum())) for q,n in enumerate(pool)])
        order=sorted(allp)
        for i in order:
            p=dict(allp[i]); ks=[j for j in known if j<i]
            shape=[1]*Z[:,0].ndim; shape[axis]=-1
            sel=best.view(shape)
            p['hyca offline']=sum(torch.where(sel==q,p[n],torch.zeros(())) for q,n in enumerate(pool))
            # online: hindsight at last computed step from those before, per channel and clip
            last=ks[-1]; pk=preds(ks[:-1],last) if len(ks)>3 else None
            if pk:
                e=torch.stack([(pk[n]-Z[:,last]).pow(2).sum(other,keepdim=True) for n in pool]); bb=e.argmin(0)
                p['hyca online']=sum(torch.where(bb==q,p[n],torch.zeros(())) for q,n in enumerate(pool))
                e=torch.stack([(pk[n]-Z[:,last]).pow(2).sum(dims,keepdim=True) for n in pool]); bb=e.argmin(0)
                p['online whole']=sum(torch.where(bb==q,p[n],torch.zeros(())) for q,n in enumerate(pool))
            p['fit a,b']=p['hold']+ab[0].item()*(p['t1']-p['hold'])+ab[1].item()*(p['t2']-p['t1'])
            p['fit a']=p['hold']+a1*(p['t1']-p['hold'])
            p['spectrum 4 .1 .5']=None
            for nm,(Mm,lam,keep,wmix) in {'spectrum M4 l.1 w1':(4,.1,99,1.),'spectrum M4 l.1 w.5':(4,.1,99,.5),'spectrum M4 l.001 w1':(4,.001,99,1.),'spectrum M2 l.1 w.5':(2,.1,99,.5)}.items():
                c=o.cheb(ks,i,Mm,lam); p[nm]=wmix*sum(a*Z[:,j] for a,j in zip(c,ks))+(1-wmix)*p['t1']
            del p['spectrum 4 .1 .5']
            ff=lambda z: torch.fft.fftn(z,dim=fftdims,norm='ortho')
            for nm,(l,h) in {'freqca hold/t2':('hold','t2'),'freqca hold/t1':('hold','t1'),'low t1 high hold':('t1','hold'),'low damp high t1':('damp','t1')}.items():
                p[nm]=torch.fft.ifftn(torch.where(low,ff(p[l]),ff(p[h])),dim=fftdims,norm='ortho').real
            if pk is None: p['hyca online']=p['online whole']=p['t1']
            for n,v in p.items():
                d=dims; add(n,m,20*((v-Z[:,i]).pow(2).sum(d).sqrt()/Z[:,i].pow(2).sum(d).sqrt())[te].log10().mean().item())
    base=[np.mean(res['t1'][m]) for m,_ in M]
    for n in sorted(res,key=lambda n:np.mean(res[n][3])): print(f'{what:14s}{n:24s}',*(f'{np.mean(res[n][m]):8.2f}({np.mean(res[n][m])-b:+.2f})' for (m,_),b in zip(M,base)),flush=True)
study(U,'output',1,o.C,R)
a=torch.tensor(o.sg,dtype=X.dtype).view(1,-1,*[1]*(X.ndim-2))
study(U-X,'out-latents',1,o.C,R)
B=blockres()
if name=='wan-tiny': Bg=B.reshape(B.shape[0],N,9,8,8,128); fd=(-4,-3,-2)
else: Bg=B[:,:,-144:].reshape(B.shape[0],N,12,12,128) if B.shape[2]>=144 else B; fd=(-3,-2)
g=[torch.fft.fftfreq(Bg.shape[d]) for d in fd]
Rb=torch.sqrt(sum(q**2 for q in torch.meshgrid(*g,indexing='ij')))[...,None]
study(Bg,'block residual',Bg.ndim-2,fd,Rb)
