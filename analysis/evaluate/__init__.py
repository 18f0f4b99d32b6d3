"""What an evaluation measures: losses of whole documents, two runs compared, the certificate of a loss."""
