# What `import relssl` offers, for type checkers, and for __init__.py, which imports each on first use.
from relssl.evaluation.embed import embed as embed
from relssl.evaluation.embed import predict as predict
from relssl.evaluation.evaluate import evaluate as evaluate
from relssl.evaluation.finetune import finetune as finetune
from relssl.evaluation.result import compare as compare
from relssl.report.advise import advise as advise
from relssl.report.doctor import doctor as doctor
from relssl.report.page import write_report as write_report
from relssl.report.views import write_views as write_views
from relssl.reproduction.reproduce import reproduce as reproduce
from relssl.train.estimate import estimate as estimate
from relssl.train.pretrain import pretrain as pretrain
from relssl.train.pretrain import resume as resume
from relssl.weights.export import export as export
from relssl.weights.export import import_weights as import_weights
from relssl.weights.opening import load_backbone as load_backbone
from relssl.weights.opening import load_run as load_run

__version__: str
__all__: list[str]
