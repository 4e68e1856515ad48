"""Open-loop: forecast error on recorded dense runs. Known steps: pattern every m after warm-up; error relative to |v|, guided output."""
import sys, torch, numpy as np, itertools
from dit_accel.rules.forecast import taylor, chebyshev
torch.set_num_threads(1)
name = sys.argv[1]; G=4.0
file={'wan-tiny':'wan-tiny-30-None-16.pt','flux-tiny':'flux-tiny-28-None-16.pt'}[name]
D=torch.load('forecast-errors/'+file)
N=len(D[0]); T=[D[0][i]['t'] for i in range(N)]; sg=np.array(T)/(1000 if T[0]>2 else 1)
def stack(key): return torch.stack([torch.stack([D[c][i][key].float() for i in range(N)]) for c in range(len(D))])
X=stack('x')[:,:,0].squeeze(2); V=stack('v').squeeze(3)  # clips, steps, branches, ...
print(X.shape,V.shape)
U = V[:,:,1]+G*(V[:,:,0]-V[:,:,1]) if len(V[0,0])==2 else V[:,:,0]
if name=='flux-tiny':
    def grid(z): # tokens 144=12x12, 48 = 12 ch x2x2
        c=z.shape[0]; z=z.reshape(c,N,12,12,12,2,2); return z.permute(0,1,4,2,5,3,6).reshape(c,N,12,24,24)
    X,U=grid(X),grid(U); C=(-2,-1); chan=2
else: C=(-3,-2,-1); chan=2
print('grid',X.shape)
F=lambda z: torch.fft.fftn(z,dim=C,norm='ortho')
dims=[torch.fft.fftfreq(X.shape[d]) for d in C]
R=torch.sqrt(sum(g**2 for g in torch.meshgrid(*dims,indexing='ij')))
def err(pred,true): # relative rms error per clip
    d=tuple(range(1,pred.ndim)); return (pred-true).pow(2).sum(d).sqrt()/true.pow(2).sum(d).sqrt()
def patt(m,w): 
    k=[i<w or (i-w)%m==m-1 or i==N-1 for i in range(N)]; return k
st={'output':lambda s:0.,'residual':lambda s:-1.,'half':lambda s:-.5,'clean':lambda s:-1/s,'vp':lambda s:-(2*s-1)/(s*s+(1-s)**2),'eps':lambda s: 0. if s>.999 else 1/(1-s)}
var={'step':lambda i:float(i),'sigma':lambda i:sg[i],'lsnr':lambda i:float(np.log((1-sg[i])/sg[i])) if sg[i]<1 else -9.}
def wts(kind,ks,at,order):
    if kind=='hold': return [0.]*(len(ks)-1)+[1.]
    if kind=='taylor': return taylor(ks,at,order)
    if kind=='damp': return taylor(ks,at,order,.2)
    if kind=='hermite': # FreqCa: least squares of order 2 on last 3 => taylor 2
        return taylor(ks,at,2)
    if kind.startswith('cheb'):
        _,M,lam,keep,w=kind.split('_'); used=ks[-int(keep):]
        c=cheb(used,at,int(M),float(lam)); c=[0.]*(len(ks)-len(used))+list(c); t=taylor(ks,at,1)
        return [float(w)*a+(1-float(w))*b for a,b in zip(c,t)]
def cheb(ks,at,M,lam,span=None):
    lo,hi=(0,N-1); s=[2*(k-lo)/(hi-lo)-1 for k in (*ks,at)]
    B=np.polynomial.chebyshev.chebvander(np.array(s),M); A,r=B[:-1],B[-1]
    return r@np.linalg.solve(A.T@A+lam*np.eye(M+1),A.T)
def run(f,m,w):
    es=[];k=patt(m,w)
    for i in range(N):
        if k[i]: continue
        ks=[j for j in range(i) if k[j]]
        es.append(err(f(ks,i),U[:,i]))
    return torch.stack(es,1)  # clips x skipped
def lin(kind,stored='residual',v='step',order=1):
    def f(ks,i):
        w=wts(kind,[var[v](j) for j in ks],var[v](i),order); a=st[stored]
        return sum(wi*(U[:,j]+a(sg[j])*X[:,j]) for wi,j in zip(w,ks) if wi)-a(sg[i])*X[:,i]
    return f
def band(cut,low,high):
    def f(ks,i):
        a,b=low(ks,i),high(ks,i); L=(R<=cut).to(a.device)
        return torch.fft.ifftn(torch.where(L,F(a),F(b)),dim=C,norm='ortho').real
    return f
M={}
for s in st:
  for v in ('step','sigma','lsnr'):
    M[f'taylor1 {s} {v}']=lin('taylor',s,v)
  M[f'hold {s}']=lin('hold',s)
  M[f'taylor2 {s} step']=lin('taylor',s,'step',2)
M['damped residual']=lin('damp')
for p in ('cheb_4_.1_99_1','cheb_4_.1_99_.5','cheb_2_.001_6_1','cheb_3_.01_8_1','cheb_1_.001_4_1','cheb_4_.001_99_1','cheb_4_.001_99_.5','cheb_3_.001_5_.5'):
  for s in ('output','residual'): M[f'{p} {s}']=lin(p,s)
for cut in (.1,.2,.3,.4):
  for s in ('output','residual'):
    M[f'freqca {cut} low hold high t2 {s}']=band(cut,lin('hold',s),lin('taylor',s,'step',2))
    M[f'freqca {cut} low hold high t1 {s}']=band(cut,lin('hold',s),lin('taylor',s))
    M[f'rev {cut} low t2 high t1 {s}']=band(cut,lin('taylor',s,'step',2),lin('taylor',s))
    M[f'rev {cut} low t1 high hold {s}']=band(cut,lin('taylor',s),lin('hold',s))
  M[f'mix {cut} low res high out']=band(cut,lin('taylor','residual'),lin('taylor','output'))
  M[f'mix {cut} low out high res']=band(cut,lin('taylor','output'),lin('taylor','residual'))
if __name__=='__main__':
  base={}
  rows=[]
  for n,f in M.items():
    r=[n]
    for m,w in ((2,6),(3,6),(4,6)):
        e=run(f,m,w); base.setdefault((m,w),None)
        # geometric mean over clips and steps, in dB
        r.append(20*e.log10().mean().item())
    rows.append(r)
  b=[r for r in rows if r[0]=='taylor1 residual step'][0]
  for r in sorted(rows,key=lambda r:r[2]): print(f'{r[0]:45s}',*(f'{x:8.2f}({x-y:+.2f})' for x,y in zip(r[1:],b[1:])))
